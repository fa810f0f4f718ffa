#include "shard/wake.h"

#include "kernel/uffd.h"

void sp_wake_guests(sp_worker *w, int guest, uint32_t block, uint64_t page, uint64_t pages)
{
    for (int i = 0; i < (int)SP_MAX_GUESTS; i++) {
        sp_guest *g = &w->guests[i];
        if ((guest >= 0 && i != guest) || atomic_load(&g->state) != SP_GUEST_ACTIVE ||
            !g->base[block])
            continue;
        /* A guest that is dying has nobody to wake: the error is its own. */
        sp_uffd_wake(g->uffd, g->base[block] + page * SP_PAGE_BYTES, pages * SP_PAGE_BYTES);
        sp_count(&w->shard->counters.wakes, 1);
    }
}
