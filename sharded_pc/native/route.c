/* Pages that go where they rest: from LISTENING on into tmp pages of their shard (`copy`) or into
 * their RAMBlock (`continue`, before LISTENING too), descriptors into the shard's rings.
 *
 * The hot path is sp_route_ahead: one readv() takes "header, page, header, page ..." apart while
 * the kernel copies, each payload into the next tmp page, betting that the source goes on where it
 * was (CONTINUE, next page).  A lost bet costs one copy: the bytes that landed in the wrong place
 * move to the stream's buffer and are parsed from there.  Pages that were bet on are not committed
 * until their header was seen to be the expected one, so a lost bet is never visible (straight.c).
 */
#include <errno.h>
#include <string.h>

#include "ram.h"

enum { WAIT_MS = 100, LAZY_DESCRIPTORS = 8 };

static_assert(SP_MAX_SHARDS <= 64, "one bit for each shard");

static sp_shard *shard(sp_ram *r, uint32_t index)
{
    return &r->control->shards[index];
}

static uint8_t *tmp_page(const sp_ram *r, uint32_t shard_index, uint64_t slot)
{
    uint64_t at = (uint64_t)shard_index * SP_POOL_SLOTS + slot % SP_POOL_SLOTS;
    return r->pool + at * SP_PAGE_BYTES;
}

static uint64_t free_slots(sp_shard *s)
{
    uint64_t taken = atomic_load_explicit(&s->slots_taken, memory_order_relaxed);
    return SP_POOL_SLOTS - (taken - atomic_load(&s->slots_freed));
}

static bool has_slot(sp_shard *s)
{
    return free_slots(s) > 0;
}

/* Room for a read worth its system call. */
static bool has_batch(sp_shard *s)
{
    return free_slots(s) >= SP_GUESS;
}

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
        sp_bell_ring(&shard(r, index)->work);
    r->unrung &= ~bit;
    r->unfreed &= ~bit;
}

/* Back-pressure: sleeps until the shard's worker makes `ready` true, and the wire with it. */
static sp_status await(sp_ram *r, uint32_t index, bool (*ready)(sp_shard *))
{
    sp_shard *s = shard(r, index);
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
    sp_shard *s = shard(r, index);
    while (!sp_ring_push(&s->background, desc)) {
        sp_status st = await(r, index, has_room);
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

/* A guest waits for this page: it gets it now, or the worker is told to hurry.  A full ring loses
 * nothing: the page stands in the background ring as well. */
static bool give(sp_ram *r, uint32_t index, const sp_desc *one)
{
    const uint8_t *src = one->kind == SP_DESC_PAGES ? tmp_page(r, index, one->slot) : NULL;
    if (r->guests && sp_guests_give(r->guests, r->received, one->block, one->first_page, src))
        return true;
    sp_ring_push(&shard(r, index)->urgent, one);
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
            sp_count(&shard(r, r->run_shard)->counters.second_pages, n);
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

void sp_route_quiet(void *arg)
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
    sp_shard *s = shard(r, index);
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
    sp_counters *n = &shard(r, index)->counters;
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

sp_status sp_route_flush(sp_ram *r)
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
static sp_status add(sp_ram *r, uint32_t index, const sp_desc *one)
{
    sp_desc *run = &r->run;
    bool data = one->kind == SP_DESC_PAGES;
    bool joins = run->pages && run->kind == one->kind && run->block == one->block &&
                 r->run_shard == index && run->first_page + run->pages == one->first_page &&
                 (!data || (run->pages < SP_GUESS && (r->written || one->slot % SP_POOL_SLOTS)));
    if (!joins) {
        sp_status st = sp_route_flush(r);
        if (st != SP_OK)
            return st;
        r->run_shard = index;
        *run = *one;
        return SP_OK;
    }
    run->pages++;
    return SP_OK;
}

sp_status sp_route_zero(sp_ram *r, uint64_t page)
{
    const sp_block *b = &r->control->blocks[r->block];
    sp_desc one = {page, 1, 0, r->block, SP_DESC_ZERO};
    r->page = page;
    return add(r, sp_shard_of(r->control, b, page), &one);
}

/* Takes a tmp page for the current page. */
static sp_status take_slot(sp_ram *r, uint32_t index)
{
    sp_shard *s = shard(r, index);
    if (!has_slot(s)) {
        /* The run may hold the very slots we are waiting for. */
        sp_status st = sp_route_flush(r);
        if (st == SP_OK)
            st = await(r, index, has_slot);
        if (st != SP_OK)
            return st;
    }
    r->slot = atomic_fetch_add_explicit(&s->slots_taken, 1, memory_order_relaxed);
    r->dst = tmp_page(r, index, r->slot);
    return SP_OK;
}

/* Finds the current page's resting place. */
static sp_status settle_page(sp_ram *r, uint32_t index)
{
    if (r->dst)
        return SP_OK;
    if (!r->written)
        return take_slot(r, index);
    r->dst = sp_straight_page(r);
    return SP_OK;
}

static sp_status commit(sp_ram *r, uint32_t index)
{
    sp_desc one = {r->page, 1, r->slot, r->block, SP_DESC_PAGES};
    r->in_page = 0;
    if (r->written && r->trashed) {
        sp_count(&shard(r, index)->counters.second_pages, 1);
        sp_count(&r->control->totals.normal, 1);
        return SP_OK;
    }
    return add(r, index, &one);
}

/* The current page and those behind it. */
static sp_status commit_gathered(sp_ram *r, uint32_t index, uint64_t pages)
{
    sp_status st = commit(r, index);
    for (uint64_t i = 1; st == SP_OK && i < pages; i++) {
        r->page++;
        st = commit(r, index);
    }
    return st;
}

static uint64_t swapped(uint64_t v)
{
    return __builtin_bswap64(v);
}

typedef struct bet {
    struct iovec iov[1 + 2 * SP_GUESS];
    uint64_t headers[SP_GUESS];
    int n_iov;
    unsigned pages;     /* bet on */
    size_t rest;        /* bytes the current page still lacks */
    uint64_t first;     /* page index of the first one bet on */
    uint64_t slot;      /* of the first one (`copy`) */
    uint32_t shard;
} bet;

/* How many of at most `most` pages from b->first on can be bet on now. */
static sp_status stakes(sp_ram *r, bet *b, uint64_t *most)
{
    if (r->written) {
        *most = sp_straight_bet(r, b->first, *most);
        return SP_OK;
    }
    sp_status st = await(r, b->shard, has_batch);
    if (st != SP_OK)
        return st;
    sp_shard *s = shard(r, b->shard);
    b->slot = atomic_load_explicit(&s->slots_taken, memory_order_relaxed);
    uint64_t slots = free_slots(s);
    *most = *most < slots ? *most : slots;
    return SP_OK;
}

static uint8_t *resting_place(const sp_ram *r, const bet *b, unsigned i)
{
    if (r->written)
        return r->alias[r->block] + (b->first + i) * SP_PAGE_BYTES;
    return tmp_page(r, b->shard, b->slot + i);
}

/* Lays out the read: the rest of the current page, then pairs of header and resting place. */
static sp_status place_bet(sp_ram *r, bet *b)
{
    const sp_block *block = &r->control->blocks[r->block];
    b->n_iov = 0;
    b->pages = 0;
    b->first = r->page + 1;
    b->rest = r->in_page ? SP_PAGE_BYTES - r->got : 0;
    if (r->in_page)
        b->iov[b->n_iov++] = (struct iovec){r->dst + r->got, b->rest};
    if (b->first >= sp_block_pages(block))
        return SP_OK;
    b->shard = sp_shard_of(r->control, block, b->first);
    uint64_t most = sp_stripe_rest(r->control, block, b->first);
    most = most < r->guess ? most : r->guess;
    sp_status st = stakes(r, b, &most);
    for (; st == SP_OK && b->pages < most; b->pages++) {
        b->iov[b->n_iov++] = (struct iovec){&b->headers[b->pages], 8};
        b->iov[b->n_iov++] = (struct iovec){resting_place(r, b, b->pages), SP_PAGE_BYTES};
    }
    return st;
}

/* The bet on page i was lost (or its header is not complete): what landed from there on moves to
 * the stream's buffer, which is empty and larger than any bet. */
static void spill(sp_ram *r, bet *b, unsigned i, size_t bytes)
{
    sp_stream *s = r->stream;
    s->pos = s->end = 0;
    int first = b->n_iov - 2 * (int)(b->pages - i);
    for (int k = first; bytes; k++) {
        size_t n = b->iov[k].iov_len < bytes ? b->iov[k].iov_len : bytes;
        memcpy(s->buf + s->end, b->iov[k].iov_base, n);
        s->end += n;
        bytes -= n;
    }
}

static void bet_lost(sp_ram *r)
{
    sp_count(&r->control->totals.spills, 1);
    r->guess = r->guess > 8 ? r->guess / 2 : 4;
}

/* Looks at what the read brought. */
static sp_status settle(sp_ram *r, bet *b, size_t bytes)
{
    if (b->rest) {
        size_t n = bytes < b->rest ? bytes : b->rest;
        r->got += n;
        bytes -= n;
        if (r->got < SP_PAGE_BYTES)
            return SP_OK;
        sp_status st = commit(r, sp_shard_of(r->control, &r->control->blocks[r->block], r->page));
        if (st != SP_OK)
            return st;
    }
    for (unsigned i = 0; i < b->pages && bytes; i++) {
        uint64_t expected = (b->first + i) * SP_PAGE_BYTES | SP_RAM_PAGE | SP_RAM_CONTINUE;
        if (bytes < 8 || swapped(b->headers[i]) != expected) {
            if (bytes >= 8)
                bet_lost(r);
            spill(r, b, i, bytes);
            return SP_OK;
        }
        bytes -= 8;
        r->page = b->first + i;
        r->in_page = 1;
        r->got = bytes < SP_PAGE_BYTES ? bytes : SP_PAGE_BYTES;
        bytes -= r->got;
        r->dst = resting_place(r, b, i);
        r->trashed = 0;
        if (!r->written)
            r->slot = atomic_fetch_add_explicit(&shard(r, b->shard)->slots_taken, 1,
                                                memory_order_relaxed);
        sp_status st = r->got == SP_PAGE_BYTES ? commit(r, b->shard) : SP_OK;
        if (st != SP_OK)
            return st;
    }
    r->guess = r->guess < SP_GUESS ? r->guess * 2 : SP_GUESS;
    return SP_OK;
}

sp_status sp_route_ahead(sp_ram *r)
{
    bet b;
    size_t got = 0;
    /* Nothing may lie here while the wire is quiet: a guest may be waiting for it. */
    sp_status st = sp_ram_flush(r);
    if (st == SP_OK)
        st = place_bet(r, &b);
    if (st == SP_OK && b.n_iov == 0)
        return sp_ram_header(r);
    if (st == SP_OK)
        st = sp_stream_scatter(r->stream, b.iov, b.n_iov, &got, r->timeout_ms);
    if (st == SP_SYS) /* no memory for a page of the alias */
        r->err = r->stream->err == EFAULT && r->written ? ENOSPC : r->stream->err;
    return st == SP_OK ? settle(r, &b, got) : st;
}

static sp_status store(sp_ram *r, const uint8_t *bytes, size_t n)
{
    if (r->written && !r->trashed)
        return sp_straight_store(r, bytes, n);
    memcpy(r->dst + r->got, bytes, n);
    r->got += n;
    return SP_OK;
}

sp_status sp_route_payload(sp_ram *r)
{
    sp_stream *s = r->stream;
    uint32_t index = sp_shard_of(r->control, &r->control->blocks[r->block], r->page);
    sp_status st = settle_page(r, index);
    if (st != SP_OK)
        return st;
    uint64_t pages = 0;
    if (r->written && (st = sp_straight_gather(r, &pages)) != SP_OK)
        return st;
    if (pages)
        return commit_gathered(r, index, pages);
    size_t n = SP_PAGE_BYTES - r->got, have = sp_stream_unread(s);
    if (have == 0)
        return sp_route_ahead(r);
    n = n < have ? n : have;
    if ((st = store(r, s->buf + s->pos, n)) != SP_OK)
        return st;
    s->pos += n;
    return r->got == SP_PAGE_BYTES ? commit(r, index) : SP_OK;
}

sp_status sp_route_discard(sp_ram *r, uint32_t block, uint64_t first_page, uint64_t pages)
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
        atomic_fetch_add(&shard(r, index)->discards_sent, 1);
        sp_bell_ring(&shard(r, index)->work);
        sp_count(&r->control->totals.discarded, n);
        first_page += n;
        pages -= n;
    }
    return SP_OK;
}

static bool is_whole(const sp_block *b, uint64_t start, uint64_t bytes)
{
    return start % SP_PAGE_BYTES == 0 && bytes % SP_PAGE_BYTES == 0 && bytes &&
           bytes <= b->bytes && start <= b->bytes - bytes;
}

sp_status sp_route_discards(sp_ram *r, uint32_t block, const uint64_t *ranges, size_t n,
                            size_t *bad)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t start = ranges[2 * i], bytes = ranges[2 * i + 1];
        *bad = i;
        if (!is_whole(&r->control->blocks[block], start, bytes))
            return SP_OUTSIDE_BLOCK;
        sp_status st = sp_route_discard(r, block, start / SP_PAGE_BYTES, bytes / SP_PAGE_BYTES);
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

sp_status sp_route_drain(sp_ram *r)
{
    sp_status st = sp_route_flush(r);
    sp_route_quiet(r);
    for (uint32_t i = 0; st == SP_OK && i < r->control->n_shards; i++) {
        st = await(r, i, is_idle);
        if (st == SP_OK && atomic_load(&shard(r, i)->failed)) {
            r->shard = i;
            st = SP_SHARD_FAILED;
        }
    }
    return st;
}
