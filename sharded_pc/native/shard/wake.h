/* Wakes guests. */
#ifndef SP_WAKE_H
#define SP_WAKE_H

#include "shard/worker.h"

/* Wakes waiters on pages of a block in one guest or (guest < 0) in all. */
void sp_wake_guests(sp_worker *w, int guest, uint32_t block, uint64_t page, uint64_t pages);

#endif
