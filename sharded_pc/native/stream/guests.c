#define _GNU_SOURCE
#include "stream/guests.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel/map.h"
#include "kernel/uffd.h"

enum { NO_GUEST = SP_MAX_GUESTS };

sp_guests *sp_guests_new(sp_control *c)
{
    sp_guests *g = calloc(1, sizeof *g);
    if (g)
        g->control = c;
    return g;
}

void sp_guests_free(sp_guests *g)
{
    free(g);
}

int sp_guests_add(sp_guests *g, uint32_t slot, const int *uffds, const uint64_t *base)
{
    sp_peer *p = &g->peers[slot];
    if (atomic_load(&p->active))
        return -EBUSY;
    memcpy(p->uffd, uffds, g->control->n_shards * sizeof *uffds);
    memcpy(p->base, base, atomic_load(&g->control->n_blocks) * sizeof *base);
    atomic_store(&p->active, 1);
    return 0;
}

/* A channel's thread says `in_use`, then looks at `active`; here it is the other way round. */
void sp_guests_drop(sp_guests *g, uint32_t slot)
{
    atomic_store(&g->peers[slot].active, 0);
    while (atomic_load(&g->in_use))
        usleep(50);
}

/* The guest's window on a block's page; false if there is none. */
static bool window(const sp_guests *g, uint32_t slot, uint32_t block, uint64_t page, sp_window *at)
{
    const sp_peer *p = &g->peers[slot];
    if (!atomic_load(&p->active) || !p->base[block])
        return false;
    uint32_t shard = sp_shard_of(g->control, &g->control->blocks[block], page);
    *at = (sp_window){p->uffd[shard], g->fd[block], p->base[block]};
    return true;
}

static bool give_by_continue(const sp_guests *g, uint32_t block, uint64_t page)
{
    bool given = true;
    for (uint32_t slot = 0; slot < SP_MAX_GUESTS; slot++) {
        sp_window at;
        int err = 0;
        if (window(g, slot, block, page, &at) && !sp_map_waited(&at, page, 1, &err))
            given = false;
    }
    return given;
}

/* The slot of the only guest there is; NO_GUEST if there are several, or none. */
static uint32_t only_guest(const sp_guests *g)
{
    uint32_t found = NO_GUEST;
    for (uint32_t slot = 0; slot < SP_MAX_GUESTS; slot++) {
        if (!atomic_load(&g->peers[slot].active))
            continue;
        if (found != NO_GUEST)
            return NO_GUEST;
        found = slot;
    }
    return found;
}

static void wake_all(const sp_guests *g, uint32_t block, uint64_t page)
{
    for (uint32_t slot = 0; slot < SP_MAX_GUESTS; slot++) {
        sp_window at;
        if (window(g, slot, block, page, &at))
            sp_uffd_wake(at.uffd, at.base + page * SP_PAGE_BYTES, SP_PAGE_BYTES);
    }
}

/* One call through the only guest's own userfaultfd fills, maps and wakes. */
static bool fill_guest(const sp_guests *g, uint32_t slot, uint32_t block, uint64_t page,
                       const uint8_t *src)
{
    sp_fill_result res;
    sp_window at;
    if (slot == NO_GUEST || !window(g, slot, block, page, &at))
        return false;
    uint64_t to = at.base + page * SP_PAGE_BYTES;
    sp_fill fill = src ? sp_uffd_copy(at.uffd, to, (uint64_t)(uintptr_t)src, SP_PAGE_BYTES, 1, &res)
                       : sp_uffd_zeropage(at.uffd, to, SP_PAGE_BYTES, 1, &res);
    return fill == SP_FILL_DONE;
}

static bool give_by_copy(const sp_guests *g, sp_word *received, uint32_t block, uint64_t page,
                         const uint8_t *src)
{
    uint32_t slot = only_guest(g);
    if (!fill_guest(g, slot, block, page, src))
        return false;
    sp_bits_set(received, g->control->blocks[block].first_bit + page, 1);
    /* A guest that came meanwhile, beside the other or in its place, may have looked at `received`
     * before it was set. */
    if (only_guest(g) != slot)
        wake_all(g, block, page);
    return true;
}

static void count(sp_control *c, uint32_t block, uint64_t page, const uint8_t *src)
{
    const sp_block *b = &c->blocks[block];
    sp_shard *s = &c->shards[sp_shard_of(c, b, page)];
    sp_waiter_end(s, b->first_bit + page, sp_now_ns());
    sp_count(&s->counters.urgent, 1);
    if (c->placement == SP_PLACE_CONTINUE)
        return; /* the worker counts it when its turn comes */
    sp_count(src ? &s->counters.pages : &s->counters.zero_pages, 1);
    if (src)
        sp_count(&s->counters.copies, 1);
}

bool sp_guests_give(sp_guests *g, sp_word *received, uint32_t block, uint64_t page,
                    const uint8_t *src)
{
    atomic_fetch_add(&g->in_use, 1);
    bool given = g->control->placement == SP_PLACE_CONTINUE
                     ? give_by_continue(g, block, page)
                     : give_by_copy(g, received, block, page, src);
    atomic_fetch_sub(&g->in_use, 1);
    if (given)
        count(g->control, block, page, src);
    return given;
}

void sp_guests_wake(sp_guests *g, uint32_t block, uint64_t page)
{
    atomic_fetch_add(&g->in_use, 1);
    wake_all(g, block, page);
    atomic_fetch_sub(&g->in_use, 1);
}
