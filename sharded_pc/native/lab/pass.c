#include "lab/pass.h"

#include <string.h>

#include "shared/control.h"
#include "stream/ram.h"

static void add(sp_passed *to, uint64_t offset)
{
    if (!to->pages)
        to->first = offset;
    if (!to->pages || offset != to->last + SP_PAGE_BYTES)
        to->runs++;
    to->pages++;
    to->last = offset;
}

size_t sp_pass_records(const uint8_t *data, size_t len, uint64_t block_size, sp_passed *normal,
                       sp_passed *zero)
{
    size_t at = 0;
    while (len - at >= 8) {
        uint64_t be;
        memcpy(&be, data + at, 8);
        uint64_t header = __builtin_bswap64(be), offset = header & ~(uint64_t)(SP_PAGE_BYTES - 1);
        uint64_t kind = header & (SP_PAGE_BYTES - 1);
        if (offset >= block_size)
            break;
        if (kind == (SP_RAM_PAGE | SP_RAM_CONTINUE) && len - at >= 8 + SP_PAGE_BYTES) {
            add(normal, offset);
            at += 8 + SP_PAGE_BYTES;
        } else if (kind == (SP_RAM_ZERO | SP_RAM_CONTINUE) && len - at >= 9 && !data[at + 8]) {
            add(zero, offset);
            at += 9;
        } else {
            break;
        }
    }
    return at;
}
