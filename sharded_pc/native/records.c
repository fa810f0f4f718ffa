#include "records.h"

#include <string.h>

#include "shared/control.h"
#include "stream/ram.h"

size_t sp_record_header(uint8_t *dst, uint64_t value, const char *name)
{
    uint64_t be = __builtin_bswap64(value);
    memcpy(dst, &be, 8);
    if (!name)
        return 8;
    size_t len = strlen(name);
    dst[8] = (uint8_t)len;
    memcpy(dst + 9, name, len);
    return 9 + len;
}

static int is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, SP_PAGE_BYTES - 1) == 0;
}

size_t sp_block_records(uint8_t *dst, const char *name, const uint8_t *src, uint64_t first,
                        uint64_t pages)
{
    uint8_t *at = dst;
    for (uint64_t i = 0; i < pages; i++, src += SP_PAGE_BYTES) {
        int zero = is_zero(src);
        uint64_t kind = (zero ? SP_RAM_ZERO : SP_RAM_PAGE) | (i ? SP_RAM_CONTINUE : 0);
        at += sp_record_header(at, (first + i) * SP_PAGE_BYTES | kind, i ? NULL : name);
        if (zero) {
            *at++ = 0;
        } else {
            memcpy(at, src, SP_PAGE_BYTES);
            at += SP_PAGE_BYTES;
        }
    }
    return (size_t)(at - dst);
}
