#define _GNU_SOURCE
#include "stream/preempt.h"

#include <errno.h>
#include <sched.h>
#include <unistd.h>

#include "kernel/uffd.h"
#include "stream/straight.h"

static const uint8_t ZEROS[SP_PAGE_BYTES];

static sp_status failed(sp_ram *r, int err)
{
    r->err = err;
    return SP_SYS;
}

static uint64_t bit_of(const sp_ram *r)
{
    return r->control->blocks[r->block].first_bit + r->page;
}

static sp_shard *shard_of(sp_ram *r)
{
    return sp_ram_shard(r, sp_shard_of(r->control, &r->control->blocks[r->block], r->page));
}

static void count(sp_ram *r, const uint8_t *bytes)
{
    sp_counters *n = &shard_of(r)->counters;
    sp_count(bytes ? &n->pages : &n->zero_pages, 1);
}

static sp_status write_page(sp_ram *r, const uint8_t *bytes)
{
    off_t at = (off_t)(r->page * SP_PAGE_BYTES);
    for (size_t done = 0; done < SP_PAGE_BYTES;) {
        ssize_t n = pwrite(r->block_fd[r->block], bytes + done, SP_PAGE_BYTES - done,
                           at + (off_t)done);
        if (n == 0 || (n < 0 && errno != EINTR))
            return failed(r, n ? errno : ENOSPC);
        done += n > 0 ? (size_t)n : 0;
    }
    return SP_OK;
}

/* `copy`, where the guest's own userfaultfd does not do: fills the page through our mapping. */
static sp_status fill(sp_ram *r, const uint8_t *bytes)
{
    uint64_t to = (uint64_t)(uintptr_t)r->own[r->block] + r->page * SP_PAGE_BYTES;
    uint64_t from = (uint64_t)(uintptr_t)(bytes ? bytes : ZEROS);
    sp_fill_result res;
    sp_fill outcome;
    while ((outcome = sp_uffd_copy(r->own_uffd, to, from, SP_PAGE_BYTES, 0, &res)) == SP_FILL_PART) {
        if (atomic_load(r->stop))
            return SP_STOPPED;
        sched_yield();
    }
    sp_count(&shard_of(r)->counters.copies, 1);
    if (outcome == SP_FILL_FAILED)
        return failed(r, res.err);
    /* What a punch left there may not be looked at yet; anything else that stands there is the page,
     * and its guest may have written to it (shard/place.c). */
    if (outcome == SP_FILL_DONE || !sp_bit_test(r->unpunched, bit_of(r)))
        return SP_OK;
    sp_status st = write_page(r, bytes ? bytes : ZEROS);
    if (st == SP_OK)
        sp_bits_clear(r->unpunched, bit_of(r), 1);
    return st;
}

static void wake(sp_ram *r)
{
    sp_waiter_end(shard_of(r), bit_of(r), sp_now_ns());
    if (r->guests)
        sp_guests_wake(r->guests, r->block, r->page);
}

static sp_status place_by_copy(sp_ram *r, const uint8_t *bytes)
{
    if (r->guests && sp_guests_give(r->guests, r->received, r->block, r->page, bytes))
        return SP_OK;
    sp_status st = fill(r, bytes);
    if (st != SP_OK)
        return st;
    sp_bits_set(r->received, bit_of(r), 1);
    wake(r);
    count(r, bytes);
    return SP_OK;
}

/* Into its block; nobody sees it before it is received and continued. */
static sp_status arrive(sp_ram *r, const uint8_t *bytes)
{
    if (!sp_straight_claim(r, bit_of(r)))
        return SP_STOPPED;
    if (bytes)
        sp_bits_set(r->written, bit_of(r), 1);
    sp_status st = bytes ? write_page(r, bytes) : sp_straight_zeros(r, r->block, r->page, 1);
    if (st == SP_OK)
        sp_bits_set(r->received, bit_of(r), 1);
    sp_straight_unclaim(r);
    return st;
}

static sp_status place_by_continue(sp_ram *r, const uint8_t *bytes)
{
    sp_status st = arrive(r, bytes);
    if (st != SP_OK)
        return st;
    /* Where it cannot be mapped the waiter asks again: its worker finds the page received, and says
     * what is wrong. */
    if (r->guests && !sp_guests_give(r->guests, r->received, r->block, r->page, bytes))
        wake(r);
    count(r, bytes);
    return SP_OK;
}

static sp_status place(sp_ram *r, const uint8_t *bytes)
{
    sp_count(&r->control->totals.preempt_pages, 1);
    if (sp_bit_test(r->received, bit_of(r))) {
        sp_count(&shard_of(r)->counters.second_pages, 1);
        return SP_OK;
    }
    return r->written ? place_by_continue(r, bytes) : place_by_copy(r, bytes);
}

sp_status sp_preempt_page(sp_ram *r, const uint8_t *bytes)
{
    return place(r, bytes);
}

sp_status sp_preempt_zero(sp_ram *r, uint64_t page)
{
    r->page = page;
    return place(r, NULL);
}
