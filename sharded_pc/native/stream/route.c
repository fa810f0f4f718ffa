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

#include "stream/hand.h"
#include "stream/route.h"
#include "stream/straight.h"

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

/* Takes a tmp page for the current page. */
static sp_status take_slot(sp_ram *r, uint32_t index)
{
    sp_shard *s = sp_ram_shard(r, index);
    if (!has_slot(s)) {
        /* The run may hold the very slots we are waiting for. */
        sp_status st = sp_hand_flush(r);
        if (st == SP_OK)
            st = sp_hand_await(r, index, has_slot);
        if (st != SP_OK)
            return st;
    }
    r->slot = atomic_fetch_add_explicit(&s->slots_taken, 1, memory_order_relaxed);
    r->dst = sp_ram_tmp_page(r, index, r->slot);
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
        sp_count(&sp_ram_shard(r, index)->counters.second_pages, 1);
        sp_count(&r->control->totals.normal, 1);
        return SP_OK;
    }
    return sp_hand_add(r, index, &one);
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
        *most = sp_straight_announce(r, b->first, *most);
        return SP_OK;
    }
    sp_status st = sp_hand_await(r, b->shard, has_batch);
    if (st != SP_OK)
        return st;
    sp_shard *s = sp_ram_shard(r, b->shard);
    b->slot = atomic_load_explicit(&s->slots_taken, memory_order_relaxed);
    uint64_t slots = free_slots(s);
    *most = *most < slots ? *most : slots;
    return SP_OK;
}

static uint8_t *resting_place(const sp_ram *r, const bet *b, unsigned i)
{
    if (r->written)
        return r->alias[r->block] + (b->first + i) * SP_PAGE_BYTES;
    return sp_ram_tmp_page(r, b->shard, b->slot + i);
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
            r->slot = atomic_fetch_add_explicit(&sp_ram_shard(r, b->shard)->slots_taken, 1,
                                                memory_order_relaxed);
        sp_status st = r->got == SP_PAGE_BYTES ? commit(r, b->shard) : SP_OK;
        if (st != SP_OK)
            return st;
    }
    r->guess = r->guess < SP_GUESS ? r->guess * 2 : SP_GUESS;
    return SP_OK;
}

/* A bet on pages in their blocks does not last while the wire is quiet: nothing is read then, *got is
 * 0, and the bet is placed anew. */
static sp_status read_bet(sp_ram *r, bet *b, size_t *got)
{
    if (!r->written)
        return sp_stream_scatter(r->stream, b->iov, b->n_iov, got, r->timeout_ms);
    sp_status st = sp_stream_scatter_now(r->stream, b->iov, b->n_iov, got);
    if (st != SP_AGAIN)
        return st;
    sp_straight_retract(r);
    return sp_stream_wait(r->stream, r->timeout_ms);
}

sp_status sp_route_ahead(sp_ram *r, bool *bet_on)
{
    bet b;
    size_t got = 0;
    /* Nothing may lie here while the wire is quiet: a guest may be waiting for it. */
    sp_status st = sp_hand_all(r);
    if (st == SP_OK)
        st = place_bet(r, &b);
    *bet_on = st == SP_OK && b.n_iov > 0;
    if (st == SP_OK && !*bet_on)
        return SP_OK;
    if (st == SP_OK)
        st = read_bet(r, &b, &got);
    if (st == SP_SYS) /* no memory for a page of the alias */
        r->err = r->stream->err == EFAULT && r->written ? ENOSPC : r->stream->err;
    if (st == SP_OK && got)
        st = settle(r, &b, got);
    if (r->written)
        sp_straight_retract(r);
    return st;
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
    if (have == 0) {
        bool any; /* the rest of this page, at least */
        return sp_route_ahead(r, &any);
    }
    n = n < have ? n : have;
    if ((st = store(r, s->buf + s->pos, n)) != SP_OK)
        return st;
    s->pos += n;
    return r->got == SP_PAGE_BYTES ? commit(r, index) : SP_OK;
}

sp_status sp_route_whole(sp_ram *r, uint64_t page, const uint8_t *bytes)
{
    uint32_t index = sp_shard_of(r->control, &r->control->blocks[r->block], page);
    r->in_page = 1;
    r->page = page;
    r->dst = NULL;
    r->got = 0;
    sp_status st = settle_page(r, index);
    if (st == SP_OK)
        st = store(r, bytes, SP_PAGE_BYTES);
    return st == SP_OK ? commit(r, index) : st;
}
