/* xbzrle: a page as its difference to what stands there; the C twin of wire/xbzrle.py. */
#ifndef SP_XBZRLE_H
#define SP_XBZRLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Changes the 4096 bytes at `page` as `n` encoded bytes say; false if they are no such thing, with the
 * page changed in part. */
bool sp_xbzrle_patch(uint8_t *page, const uint8_t *encoded, size_t n);

#endif
