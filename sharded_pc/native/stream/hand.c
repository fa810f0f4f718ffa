/* From a run of pages to the shard that owns them: whoever waits gets its page at once, a descriptor
 * goes on the shard's ring, and the worker is told when that is worth a wake-up.
 */
#include <errno.h>

#include "stream/hand.h"

#include "stream/precopy.h"
#include "stream/straight.h"

enum { WAIT_MS = 100, LAZY_DESCRIPTORS = 8 };

static_assert(SP_MAX_SHARDS <= 64, "one bit for each shard");

static bool has_room(sp_shard *s)
{
    uint64_t head = atomic_load_explicit(&s->background.head, memory_order_relaxed);
    return head - atomic_load(&s->background.tail) < SP_RING_SLOTS;
}

static bool is_idle(sp_shard *s)
{
    return atomic_load(&s->background.head) == atomic_load(&s->background.tail);
}

/* Tells the shard what it was not told yet. */
static void tell(sp_ram *r, uint32_t index)
{
    uint64_t bit = 1ULL << index;
    if ((r->unrung | r->unfreed) & bit)
        sp_bell_ring(&sp_ram_shard(r, index)->work);
    r->unrung &= ~bit;
    r->unfreed &= ~bit;
}

/* Back-pressure: sleeps until the shard's worker makes `ready` true, and the wire with it. */
sp_status sp_hand_await(sp_ram *r, uint32_t index, bool (*ready)(sp_shard *))
{
    sp_shard *s = sp_ram_shard(r, index);
    if (!ready(s)) /* a reader before us, whose connection was lost, may have left it untold */
        r->unrung |= 1ULL << index;
    while (!ready(s)) {
        tell(r, index);
        uint32_t seen = sp_bell_prepare(&s->space);
        bool stop = atomic_load(r->stop), broken = atomic_load(&s->failed);
        if (stop || broken || ready(s)) {
            sp_bell_cancel(&s->space);
            if (!stop && !broken)
                break;
            r->shard = index;
            return stop ? SP_STOPPED : SP_SHARD_FAILED;
        }
        sp_bell_wait(&s->space, seen, WAIT_MS);
    }
    return SP_OK;
}

static sp_status push(sp_ram *r, uint32_t index, const sp_desc *desc)
{
    sp_shard *s = sp_ram_shard(r, index);
    while (!sp_ring_push(&s->background, desc)) {
        sp_status st = sp_hand_await(r, index, has_room);
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

/* A guest waits for this page: it gets it now, or the worker is told to hurry.  A full ring loses
 * nothing: the page stands in the background ring as well. */
static bool give(sp_ram *r, uint32_t index, const sp_desc *one)
{
    const uint8_t *src = one->kind == SP_DESC_PAGES ? sp_ram_tmp_page(r, index, one->slot) : NULL;
    if (r->guests && sp_guests_give(r->guests, r->received, one->block, one->first_page, src))
        return true;
    sp_ring_push(&sp_ram_shard(r, index)->urgent, one);
    return false;
}

/* True if every page of the run was given to whom it may concern. */
static bool give_requested(sp_ram *r, uint32_t index, const sp_desc *run)
{
    uint64_t given = 0;
    uint64_t bit = r->control->blocks[run->block].first_bit + run->first_page;
    if (!sp_bits_any(r->requested, bit, run->pages))
        return false;
    for (uint64_t i = 0; i < run->pages; i++) {
        if (!sp_bit_test(r->requested, bit + i))
            continue;
        sp_desc one = {run->first_page + i, 1, run->slot + i, run->block, run->kind};
        given += give(r, index, &one);
    }
    return given == run->pages;
}

/* `continue`: the bytes are where they belong.  Zero pages that arrive again change nothing. */
static sp_status arrive(sp_ram *r, const sp_desc *run)
{
    uint64_t bit = r->control->blocks[run->block].first_bit + run->first_page;
    for (uint64_t i = 0, n; i < run->pages; i += n) {
        n = sp_bits_run(r->received, bit + i, run->pages - i);
        if (sp_bit_test(r->received, bit + i)) {
            sp_count(&sp_ram_shard(r, r->run_shard)->counters.second_pages, n);
            continue;
        }
        sp_status st = run->kind == SP_DESC_ZERO
                           ? sp_straight_zeros(r, run->block, run->first_page + i, n) : SP_OK;
        if (st != SP_OK)
            return st;
        sp_bits_set(r->received, bit + i, n);
    }
    return SP_OK;
}

void sp_hand_quiet(void *arg)
{
    sp_ram *r = arg;
    while (r->unrung)
        tell(r, (uint32_t)__builtin_ctzll(r->unrung));
}

/* With `copy` the worker's work holds tmp pages and whatever a guest waits for.  With `continue`
 * nobody waits for it, so a sleeping worker is woken for a good deal of it, or when the wire is
 * quiet: a wake-up costs as much as mapping some dozens of pages. */
static void ring(sp_ram *r, uint32_t index)
{
    sp_shard *s = sp_ram_shard(r, index);
    uint64_t queued = atomic_load_explicit(&s->background.head, memory_order_relaxed) -
                      atomic_load_explicit(&s->background.tail, memory_order_relaxed);
    if (r->written && queued < LAZY_DESCRIPTORS) {
        r->unrung |= 1ULL << index;
        return;
    }
    r->unrung |= 1ULL << index;
    tell(r, index);
}

/* Hands a run on to its shard, whose guests may have it already (`given`): then no worker is woken,
 * for it would only free tmp pages, or do nothing at all. */
static sp_status hand_on(sp_ram *r, const sp_desc *run, uint32_t index, bool given)
{
    sp_counters *n = &sp_ram_shard(r, index)->counters;
    if (given && r->written) {
        sp_count(run->kind == SP_DESC_ZERO ? &n->zero_pages : &n->pages, run->pages);
        return SP_OK;
    }
    sp_status st = push(r, index, run);
    if (st != SP_OK)
        return st;
    if (given)
        r->unfreed |= 1ULL << index;
    else
        ring(r, index);
    return SP_OK;
}

sp_status sp_hand_flush(sp_ram *r)
{
    if (r->run.pages == 0)
        return SP_OK;
    sp_status st = r->written ? arrive(r, &r->run) : SP_OK;
    if (st == SP_OK && r->postcopy)
        st = hand_on(r, &r->run, r->run_shard, give_requested(r, r->run_shard, &r->run));
    if (st != SP_OK)
        return st;
    if (r->run.kind == SP_DESC_PAGES)
        sp_count(&r->control->totals.normal, r->run.pages);
    r->run.pages = 0;
    return SP_OK;
}

/* Adds one page to the run, handing the run on when the page does not belong to it. */
sp_status sp_hand_add(sp_ram *r, uint32_t index, const sp_desc *one)
{
    sp_desc *run = &r->run;
    bool data = one->kind == SP_DESC_PAGES;
    bool joins = run->pages && run->kind == one->kind && run->block == one->block &&
                 r->run_shard == index && run->first_page + run->pages == one->first_page &&
                 (!data || (run->pages < SP_GUESS && (r->written || one->slot % SP_POOL_SLOTS)));
    if (!joins) {
        sp_status st = sp_hand_flush(r);
        if (st != SP_OK)
            return st;
        r->run_shard = index;
        *run = *one;
        return SP_OK;
    }
    run->pages++;
    return SP_OK;
}

sp_status sp_hand_zero(sp_ram *r, uint64_t page)
{
    const sp_block *b = &r->control->blocks[r->block];
    sp_desc one = {page, 1, 0, r->block, SP_DESC_ZERO};
    r->page = page;
    return sp_hand_add(r, sp_shard_of(r->control, b, page), &one);
}

sp_status sp_hand_discard(sp_ram *r, uint32_t block, uint64_t first_page, uint64_t pages)
{
    const sp_block *b = &r->control->blocks[block];
    if (r->written) {
        /* What stands there stays: guests see only what is received. */
        sp_bits_clear(r->received, b->first_bit + first_page, pages);
        sp_count(&r->control->totals.discarded, pages);
        return SP_OK;
    }
    while (pages) {
        uint64_t n = sp_stripe_rest(r->control, b, first_page);
        n = n < pages ? n : pages;
        uint32_t index = sp_shard_of(r->control, b, first_page);
        sp_desc desc = {first_page, n, 0, block, SP_DESC_DISCARD};
        sp_status st = push(r, index, &desc);
        if (st != SP_OK)
            return st;
        atomic_fetch_add(&sp_ram_shard(r, index)->discards_sent, 1);
        sp_bell_ring(&sp_ram_shard(r, index)->work);
        sp_count(&r->control->totals.discarded, n);
        first_page += n;
        pages -= n;
    }
    return SP_OK;
}

sp_status sp_hand_discards(sp_ram *r, uint32_t block, const uint64_t *ranges, size_t n,
                            size_t *bad)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t start = ranges[2 * i], bytes = ranges[2 * i + 1];
        *bad = i;
        if (!sp_is_whole(&r->control->blocks[block], start, bytes))
            return SP_OUTSIDE_BLOCK;
        sp_status st = sp_hand_discard(r, block, start / SP_PAGE_BYTES, bytes / SP_PAGE_BYTES);
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

sp_status sp_hand_drain(sp_ram *r)
{
    sp_status st = sp_hand_flush(r);
    sp_hand_quiet(r);
    for (uint32_t i = 0; st == SP_OK && i < r->control->n_shards; i++) {
        st = sp_hand_await(r, i, is_idle);
        if (st == SP_OK && atomic_load(&sp_ram_shard(r, i)->failed)) {
            r->shard = i;
            st = SP_SHARD_FAILED;
        }
    }
    return st;
}

sp_status sp_hand_all(sp_ram *r)
{
    if (r->main) { /* its pages are handed on one by one */
        sp_count(&r->control->totals.preempt_bytes, r->stream->total - r->counted);
        r->counted = r->stream->total;
        return SP_OK;
    }
    atomic_store_explicit(&r->control->totals.transferred, r->stream->total, memory_order_relaxed);
    sp_status st = r->postcopy ? SP_OK : sp_precopy_flush(r);
    return st == SP_OK ? sp_hand_flush(r) : st;
}
