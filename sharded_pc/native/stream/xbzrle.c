/* Runs of bytes that stay and of bytes that are replaced take turns (QEMU migration/xbzrle.c
 * xbzrle_decode_buffer). */
#include "stream/xbzrle.h"

#include <string.h>

#include "shared/control.h"

typedef struct cursor {
    const uint8_t *at, *end;
} cursor;

/* A length is LEB128 of at most two bytes, and never the last byte. */
static bool take_length(cursor *c, size_t *length)
{
    if (c->end - c->at < 2)
        return false;
    *length = *c->at++;
    if (*length < 0x80)
        return true;
    if (*c->at & 0x80)
        return false;
    *length = (*length & 0x7f) | (size_t)*c->at++ << 7;
    return true;
}

bool sp_xbzrle_patch(uint8_t *page, const uint8_t *encoded, size_t n)
{
    cursor c = {encoded, encoded + n};
    size_t to = 0, same, changed;
    while (c.at < c.end) {
        bool first = c.at == encoded;
        if (!take_length(&c, &same) || !take_length(&c, &changed))
            return false;
        if (changed == 0 || (same == 0 && !first)) /* only the first run may be empty */
            return false;
        if (same + changed > SP_PAGE_BYTES - to || changed > (size_t)(c.end - c.at))
            return false;
        memcpy(page + to + same, c.at, changed);
        to += same + changed;
        c.at += changed;
    }
    return true;
}
