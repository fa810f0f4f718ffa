/* `continue`: the worker maps pages that stand in their block into its guests, in ranges, so that
 * they do not fault on what is here. */
#include "kernel/map.h"
#include "shard/ahead.h"
#include "shard/wake.h"

static bool window(const sp_worker *w, uint32_t guest, uint32_t block, sp_window *at)
{
    const sp_guest *g = &w->guests[guest];
    if (atomic_load(&g->state) != SP_GUEST_ACTIVE || !g->base[block])
        return false;
    *at = (sp_window){g->uffd, w->fd[block], g->base[block]};
    return true;
}

void sp_map_arrived(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages, uint32_t kind)
{
    sp_counters *n = &w->shard->counters;
    uint64_t bit = w->control->blocks[block].first_bit + page;
    sp_window at;
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++)
        if (window(w, i, block, &at))
            sp_count(&n->mapped, sp_map_pages(&at, page, pages));
    sp_count(kind == SP_DESC_ZERO ? &n->zero_pages : &n->pages, pages);
    if (!sp_bits_any(w->requested, bit, pages))
        return;
    /* A hole cannot be continued: its waiter asks again and is answered. */
    if (kind == SP_DESC_ZERO)
        sp_wake_guests(w, -1, block, page, pages);
    uint64_t now = sp_now_ns();
    for (uint64_t i = 0; i < pages; i++)
        if (sp_bit_test(w->requested, bit + i))
            sp_waiter_end(w->shard, bit + i, now);
}

static void map_received(sp_worker *w, const sp_window *at, const sp_block *b, uint64_t page,
                         uint64_t pages)
{
    for (uint64_t i = 0, n; i < pages; i += n) {
        uint64_t bit = b->first_bit + page + i;
        n = sp_bits_run(w->received, bit, pages - i);
        if (sp_bit_test(w->received, bit))
            sp_count(&w->shard->counters.mapped, sp_map_pages(at, page + i, n));
    }
}

/* Goes on to the guest's next stripe that is this shard's; false: there is none. */
static bool next_stripe(const sp_worker *w, sp_guest *g, uint32_t *block, uint64_t *page,
                        uint64_t *pages)
{
    uint32_t n_blocks = atomic_load(&w->control->n_blocks);
    while (g->ahead_block < n_blocks) {
        const sp_block *b = &w->control->blocks[g->ahead_block];
        if (g->ahead_page >= sp_block_pages(b)) {
            g->ahead_block++;
            g->ahead_page = 0;
            continue;
        }
        *block = g->ahead_block;
        *page = g->ahead_page;
        *pages = sp_stripe_rest(w->control, b, *page);
        g->ahead_page += *pages;
        if (sp_shard_of(w->control, b, *page) == w->index)
            return true;
    }
    return false;
}

bool sp_map_ahead(sp_worker *w)
{
    if (!atomic_load(&w->listening))
        return false;
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++) {
        uint32_t block;
        uint64_t page, pages;
        sp_window at;
        if (atomic_load(&w->guests[i].state) != SP_GUEST_ACTIVE ||
            !next_stripe(w, &w->guests[i], &block, &page, &pages))
            continue;
        if (window(w, i, block, &at))
            map_received(w, &at, &w->control->blocks[block], page, pages);
        return true;
    }
    return false;
}
