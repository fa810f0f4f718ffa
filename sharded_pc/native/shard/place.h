/* Places pages: the placement loop, and what it does. */
#ifndef SP_PLACE_H
#define SP_PLACE_H

#include "shard/worker.h"

/* Also called directly by postcopy_ram.py: 0 or -errno. */
int sp_place_pages(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages, const uint8_t *src);
int sp_place_zero(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages);
int sp_discard_pages(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages);
/* Makes sure that a received page which is a hole (zeros) exists, so that a woken guest maps it. */
int sp_fill_hole(sp_worker *w, uint32_t block, uint64_t page);

#endif
