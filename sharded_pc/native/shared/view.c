#include "shared/view.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>


#define LOOK(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define COPY(from, name) v->name = LOOK((from)->name)

void sp_view_control(sp_control *c, sp_control_view *v)
{
    v->bytes = c->bytes;
    v->n_shards = c->n_shards;
    COPY(c, owner);
    COPY(c, ram_section);
    COPY(c, destination);
    COPY(c, destination_start);
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++)
        v->guests[i] = LOOK(c->guests[i]);
    v->placement = c->placement;
    memcpy(v->placement_reason, c->placement_reason, sizeof v->placement_reason);
    v->postcopy_state = atomic_load(&c->postcopy_state);
    COPY(c, status);
    COPY(c, n_guests);
    v->n_blocks = atomic_load(&c->n_blocks);
    v->n_bits = v->n_blocks ? c->n_bits : 0;
    v->stripe_pages = v->n_blocks ? c->stripe_pages : 0;
}

void sp_view_totals(sp_control *c, sp_totals_view *v)
{
    sp_totals *t = &c->totals;
    v->transferred = LOOK(t->transferred) + LOOK(t->multifd);
    COPY(t, normal);
    COPY(t, duplicate);
    COPY(t, requests_sent);
    COPY(t, discarded);
    COPY(t, spills);
    COPY(t, preempt_bytes);
    COPY(t, preempt_pages);
    COPY(t, started_ns);
    COPY(t, setup_ns);
    COPY(t, stopped_ns);
    COPY(t, running_ns);
    COPY(t, ended_ns);
}

int sp_view_shard(sp_control *c, uint32_t index, sp_shard_view *v)
{
    if (index >= c->n_shards)
        return -ENOENT;
    sp_shard *s = &c->shards[index];
    sp_counters *n = &s->counters;
    COPY(n, pages);
    COPY(n, zero_pages);
    COPY(n, copies);
    COPY(n, mapped);
    COPY(n, urgent);
    /* A page placed ahead of its turn meets its background descriptor later: no second arrival. */
    uint64_t met_again = LOOK(n->second_pages);
    if (c->placement == SP_PLACE_COPY)
        met_again -= met_again < v->urgent ? met_again : v->urgent;
    v->second_pages = met_again;
    COPY(n, wakes);
    COPY(n, discarded);
    COPY(n, unpunched);
    COPY(n, faults);
    COPY(n, requests);
    COPY(n, late_faults);
    COPY(n, lost_samples);
    COPY(n, latency_ns);
    for (unsigned i = 0; i < SP_LATENCY_BUCKETS; i++)
        v->latency[i] = LOOK(n->latency[i]);
    uint64_t tail = LOOK(s->background.tail);
    v->queued = LOOK(s->background.head) - tail;
    COPY(s, discards_sent);
    COPY(s, discards_done);
    COPY(s, beats);
    COPY(s, failed);
    COPY(s, pid);
    COPY(s, restarts);
    return 0;
}

int sp_view_block(sp_control *c, uint32_t index, sp_block_view *v)
{
    if (index >= atomic_load(&c->n_blocks))
        return -ENOENT;
    const sp_block *b = &c->blocks[index];
    memcpy(v->name, b->name, sizeof v->name);
    v->bytes = b->bytes;
    v->first_bit = b->first_bit;
    v->first_stripe = b->first_stripe;
    v->source_page = b->source_pages * SP_PAGE_BYTES;
    return 0;
}

int sp_view_shard_of(sp_control *c, uint32_t block, uint64_t page)
{
    if (block >= atomic_load(&c->n_blocks) || page >= sp_block_pages(&c->blocks[block]))
        return -ENOENT;
    return (int)sp_shard_of(c, &c->blocks[block], page);
}

void sp_note_time(sp_control *c, int what)
{
    sp_totals *t = &c->totals;
    uint64_t now = sp_now_ns();
    switch (what) {
    case SP_AT_START: atomic_store(&t->started_ns, now); break;
    case SP_AT_SETUP: atomic_store(&t->setup_ns, now); break;
    case SP_AT_STOPPED: atomic_store(&t->stopped_ns, now); break;
    case SP_AT_RUNNING: atomic_store(&t->running_ns, now); break;
    default: atomic_store(&t->ended_ns, now); break;
    }
}

void sp_note_shard(sp_control *c, uint32_t index, uint32_t pid)
{
    atomic_store(&c->shards[index].pid, pid);
}

void sp_note_death(sp_control *c, uint32_t index)
{
    sp_shard *s = &c->shards[index];
    sp_rp_take_back(c, index);
    atomic_store(&s->work.waiting, 0); /* nobody else waits there */
    sp_bell_ring(&s->space);           /* what it freed last it may not have said */
}

void sp_note_restart(sp_control *c, uint32_t index)
{
    atomic_fetch_add(&c->shards[index].restarts, 1);
}

void sp_note_failed(sp_control *c, uint32_t index, int failed)
{
    atomic_store(&c->shards[index].failed, (uint32_t)failed);
    sp_bell_ring(&c->shards[index].space);
}

uint32_t sp_shard_beats(const sp_control *c, uint32_t index)
{
    return LOOK(c->shards[index].beats);
}

void sp_nudge(sp_control *c, uint32_t index)
{
    sp_bell_ring(&c->shards[index].work);
}

void sp_note_guest(sp_control *c, uint32_t slot, uint32_t pid)
{
    uint32_t before = atomic_exchange(&c->guests[slot], pid);
    atomic_fetch_add(&c->n_guests, (uint32_t)(pid != 0) - (uint32_t)(before != 0));
}

void sp_note_back_lost(sp_control *c)
{
    atomic_store(&c->back_lost, 1);
}

void sp_note_ram_section(sp_control *c, uint32_t number)
{
    atomic_store(&c->ram_section, number + 1);
}

void sp_note_destination(sp_control *c, uint32_t pid, uint64_t start)
{
    atomic_store(&c->destination_start, start);
    atomic_store(&c->destination, pid);
}

void sp_add_transferred(sp_control *c, uint64_t total)
{
    atomic_store_explicit(&c->totals.transferred, total, memory_order_relaxed);
}

int sp_bits_test_at(const sp_word *map, uint64_t bit)
{
    return sp_bit_test(map, bit);
}

int sp_bits_claim_at(sp_word *map, uint64_t bit)
{
    return sp_bit_claim(map, bit);
}

void sp_bits_set_at(sp_word *map, uint64_t first, uint64_t n)
{
    sp_bits_set(map, first, n);
}

uint64_t sp_bits_clear_at(sp_word *map, uint64_t first, uint64_t n)
{
    return sp_bits_clear(map, first, n);
}

uint64_t sp_bits_count_at(const sp_word *map, uint64_t first, uint64_t n)
{
    return sp_bits_count(map, first, n);
}

uint64_t sp_bits_run_at(const sp_word *map, uint64_t first, uint64_t n)
{
    return sp_bits_run(map, first, n);
}

sp_ring *sp_ring_new(void)
{
    sp_ring *ring = aligned_alloc(64, sizeof *ring);
    if (ring)
        memset(ring, 0, sizeof *ring);
    return ring;
}

void sp_ring_free(sp_ring *ring)
{
    free(ring);
}

int sp_ring_push_one(sp_ring *ring, const sp_desc *desc)
{
    return sp_ring_push(ring, desc);
}

int sp_ring_take_one(sp_ring *ring, sp_desc *desc)
{
    const sp_desc *oldest = sp_ring_peek(ring);
    if (!oldest)
        return 0;
    *desc = *oldest;
    sp_ring_pop(ring);
    return 1;
}

static int take_one_request(sp_control *c, uint32_t shard, sp_desc *desc)
{
    for (uint32_t g = 0; g < SP_MAX_GUESTS; g++)
        if (sp_ring_take_one(&c->shards[shard].requests[g], desc))
            return 1;
    return 0;
}

int sp_take_request(sp_control *c, uint32_t shard, int timeout_ms, sp_desc *desc)
{
    uint32_t seen = sp_bell_prepare(&c->requests);
    if (take_one_request(c, shard, desc)) {
        sp_bell_cancel(&c->requests);
        return 1;
    }
    sp_bell_wait(&c->requests, seen, timeout_ms);
    return take_one_request(c, shard, desc);
}
