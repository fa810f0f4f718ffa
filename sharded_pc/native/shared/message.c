#include "shared/message.h"

#include <string.h>

uint8_t *sp_put(uint8_t *to, uint64_t v, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--)
        *to++ = (uint8_t)(v >> (8 * i));
    return to;
}

size_t sp_put_request(const sp_control *c, uint8_t *to, const sp_desc *d, bool named)
{
    const sp_block *b = &c->blocks[d->block];
    size_t len = strnlen(b->name, sizeof b->name);
    uint8_t *at = sp_put(to, named ? MSG_REQ_PAGES_ID : MSG_REQ_PAGES, 2);
    at = sp_put(at, named ? 13 + len : 12, 2);
    uint64_t first = d->first_page, pages = d->pages;
    sp_whole_source_pages(b, &first, &pages);
    at = sp_put(at, first * SP_PAGE_BYTES, 8);
    at = sp_put(at, pages * SP_PAGE_BYTES, 4);
    if (named) {
        at = sp_put(at, len, 1);
        memcpy(at, b->name, len);
        at += len;
    }
    return (size_t)(at - to);
}
