/* The placement side of a worker. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel/uffd.h"
#include "shard/ahead.h"
#include "shard/place.h"
#include "shard/wake.h"

enum { IDLE_MS = 100 /* and then it beats */, PUNCHES = 4 };

static const uint8_t ZEROS[SP_PAGE_BYTES];

/* Whoever watches us sees that we go on.  We are the only writer. */
static void beat(sp_worker *w)
{
    uint32_t beats = atomic_load_explicit(&w->shard->beats, memory_order_relaxed);
    atomic_store_explicit(&w->shard->beats, beats + 1, memory_order_relaxed);
}

static uint64_t bit_of(const sp_worker *w, uint32_t block, uint64_t page)
{
    return w->control->blocks[block].first_bit + page;
}

static uint64_t addr_of(const sp_worker *w, uint32_t block, uint64_t page)
{
    return (uint64_t)(uintptr_t)w->base[block] + page * SP_PAGE_BYTES;
}

/* Makes pages that are in place known, and wakes whoever asked for one of them. */
static void publish(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages)
{
    uint64_t bit = bit_of(w, block, page);
    sp_bits_set(w->received, bit, pages);
    if (!sp_bits_any(w->requested, bit, pages))
        return;
    sp_wake_guests(w, -1, block, page, pages);
    uint64_t now = sp_now_ns();
    for (uint64_t i = 0; i < pages; i++)
        if (sp_bit_test(w->requested, bit + i))
            sp_waiter_end(w->shard, bit + i, now);
}

/* Pages from `page` on that are still missing; 0 if the first one is here, which is then counted
 * as a second arrival: it changes nothing. */
static uint64_t missing_run(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages)
{
    uint64_t bit = bit_of(w, block, page);
    if (!sp_bit_test(w->received, bit))
        return sp_bits_run(w->received, bit, pages);
    sp_count(&w->shard->counters.second_pages, 1);
    return 0;
}

/* A page that a punch left in place is overwritten before anybody may look: READY waits for it.  Not
 * so a page that stands there for another reason: a predecessor died between the copy and the mark,
 * and its guest may have written there since. */
static int overwrite(sp_worker *w, uint32_t block, uint64_t page, const uint8_t *src)
{
    off_t at = (off_t)(page * SP_PAGE_BYTES);
    for (size_t done = 0; done < SP_PAGE_BYTES;) {
        ssize_t n = pwrite(w->fd[block], src + done, SP_PAGE_BYTES - done, at + (off_t)done);
        if (n < 0 && errno != EINTR)
            return -errno;
        done += n > 0 ? (size_t)n : 0;
    }
    sp_bits_clear(w->written, bit_of(w, block, page), 1);
    return 0;
}

int sp_place_pages(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages, const uint8_t *src)
{
    sp_counters *n = &w->shard->counters;
    while (pages) {
        uint64_t done = 1, run = missing_run(w, block, page, pages);
        beat(w);
        if (run) {
            sp_fill_result res;
            sp_fill fill = sp_uffd_copy(w->uffd, addr_of(w, block, page), (uint64_t)(uintptr_t)src,
                                        run * SP_PAGE_BYTES, 0, &res);
            if (fill == SP_FILL_FAILED) {
                w->err_bit = bit_of(w, block, page);
                return -res.err;
            }
            if (fill == SP_FILL_PRESENT && sp_bit_test(w->written, bit_of(w, block, page))) {
                int rc = overwrite(w, block, page, src);
                if (rc) {
                    w->err_bit = bit_of(w, block, page);
                    return rc;
                }
            }
            done = fill == SP_FILL_PRESENT ? 1 : res.done / SP_PAGE_BYTES;
            sp_count(&n->copies, 1);
            sp_count(&n->pages, done);
            if (done)
                publish(w, block, page, done);
            else
                sched_yield();
        }
        page += done;
        pages -= done;
        src += done * SP_PAGE_BYTES;
    }
    return 0;
}

int sp_fill_hole(sp_worker *w, uint32_t block, uint64_t page)
{
    sp_fill_result res;
    sp_fill fill;
    do {
        fill = sp_uffd_zeropage(w->uffd, addr_of(w, block, page), SP_PAGE_BYTES, 0, &res);
    } while (fill == SP_FILL_PART);
    /* The kernel counts the new page before it looks whether one is there: full is no answer. */
    off_t at = (off_t)(page * SP_PAGE_BYTES);
    if (fill == SP_FILL_FAILED && lseek(w->fd[block], at, SEEK_DATA) != at)
        return -res.err;
    return 0;
}

/* A zero page nobody waits for stays a hole: it reads as zeros, costs no memory, and a later fault
 * on it is answered without the source.  One that is waited for must exist before the wake. */
int sp_place_zero(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages)
{
    while (pages) {
        uint64_t done = 1, run = missing_run(w, block, page, pages);
        if (run) {
            uint64_t bit = bit_of(w, block, page);
            bool waited = sp_bit_test(w->requested, bit), stands = sp_bit_test(w->written, bit);
            done = sp_bits_run(w->requested, bit, sp_bits_run(w->written, bit, run));
            done = waited || stands ? 1 : done;
            int rc = 0;
            if (stands)
                rc = overwrite(w, block, page, ZEROS);
            else if (waited)
                rc = sp_fill_hole(w, block, page);
            if (rc) {
                w->err_bit = bit;
                return rc;
            }
            sp_count(&w->shard->counters.zero_pages, done);
            publish(w, block, page, done);
        }
        page += done;
        pages -= done;
    }
    return 0;
}

static off_t next_data(const sp_worker *w, uint32_t block, off_t from, off_t end)
{
    off_t found = lseek(w->fd[block], from, SEEK_DATA);
    return found < 0 || found > end ? end : found;
}

/* Remembers which pages of a range are no holes. */
static void note_standing(sp_worker *w, uint32_t block, off_t at, off_t end)
{
    while ((at = next_data(w, block, at, end)) < end) {
        off_t hole = lseek(w->fd[block], at, SEEK_HOLE);
        hole = hole < 0 || hole > end ? end : hole;
        uint64_t page = (uint64_t)at / SP_PAGE_BYTES;
        uint64_t pages = ((uint64_t)hole + SP_PAGE_BYTES - 1) / SP_PAGE_BYTES - page;
        sp_bits_set(w->written, bit_of(w, block, page), pages);
        sp_count(&w->shard->counters.unpunched, pages);
        at = hole;
    }
}

/* Part of a huge page that somebody holds a reference to is not punched: the kernel only zeroes it
 * (mm/truncate.c truncate_inode_partial_folio), and says nothing. */
int sp_discard_pages(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages)
{
    off_t at = (off_t)(page * SP_PAGE_BYTES), end = at + (off_t)(pages * SP_PAGE_BYTES);
    sp_bits_clear(w->received, bit_of(w, block, page), pages);
    sp_bits_clear(w->written, bit_of(w, block, page), pages);
    sp_count(&w->shard->counters.discarded, pages);
    for (int tries = PUNCHES; tries; tries--) {
        if (fallocate(w->fd[block], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, end - at))
            return -errno;
        if (next_data(w, block, at, end) == end)
            return 0;
        sched_yield(); /* most references are held for a moment */
    }
    note_standing(w, block, at, end);
    return 0;
}

static const uint8_t *tmp_page(const sp_worker *w, uint64_t slot)
{
    return w->pool + slot % SP_POOL_SLOTS * SP_PAGE_BYTES;
}

static int obey(sp_worker *w, const sp_desc *d)
{
    if (w->control->placement == SP_PLACE_CONTINUE) {
        sp_map_arrived(w, d->block, d->first_page, d->pages, d->kind);
        return 0;
    }
    switch (d->kind) {
    case SP_DESC_PAGES:
        return sp_place_pages(w, d->block, d->first_page, d->pages, tmp_page(w, d->slot));
    case SP_DESC_ZERO:
        return sp_place_zero(w, d->block, d->first_page, d->pages);
    default:
        return sp_discard_pages(w, d->block, d->first_page, d->pages);
    }
}

/* A hint may be older than its background descriptor, whose tmp pages may be reused by now: a page
 * that is here already is left alone without a look at the bytes. */
static int hurry(sp_worker *w, bool *any)
{
    const sp_desc *d;
    int rc = 0;
    while (rc == 0 && (d = sp_ring_peek(&w->shard->urgent))) {
        *any = true;
        if (!sp_bit_test(w->received, bit_of(w, d->block, d->first_page))) {
            rc = obey(w, d);
            sp_count(&w->shard->counters.urgent, 1);
        }
        if (rc == 0)
            sp_ring_pop(&w->shard->urgent);
    }
    return rc;
}

/* Two descriptors whose pages and tmp pages are neighbours are placed by one ioctl. */
static bool join(const sp_worker *w, sp_desc *d, const sp_desc *next)
{
    if (!next || next->kind != d->kind || next->block != d->block || d->kind == SP_DESC_DISCARD ||
        next->first_page != d->first_page + d->pages)
        return false;
    if (w->control->placement == SP_PLACE_CONTINUE) {
        d->pages += next->pages;
        return true;
    }
    if (d->pages + next->pages > 64)
        return false;
    if (d->kind == SP_DESC_PAGES &&
        (next->slot != d->slot + d->pages || next->slot % SP_POOL_SLOTS == 0))
        return false;
    d->pages += next->pages;
    return true;
}

static const sp_desc *peek_at(sp_ring *ring, uint64_t ahead)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed) + ahead;
    if (tail >= atomic_load_explicit(&ring->head, memory_order_acquire))
        return NULL;
    return &ring->slots[tail % SP_RING_SLOTS];
}

/* A producer that waits is woken when it can do a good deal of work, not for every page: half of
 * the tmp pages and of the ring are free, or nothing is left to do. */
static bool worth_a_ring(sp_shard *s, uint64_t tail)
{
    uint64_t queued = atomic_load(&s->background.head) - tail;
    uint64_t used = atomic_load(&s->slots_taken) - atomic_load(&s->slots_freed);
    return queued == 0 || (queued <= SP_RING_SLOTS / 2 && used <= SP_POOL_SLOTS / 2);
}

static void finish(sp_worker *w, const sp_desc *d, uint64_t n_desc)
{
    sp_shard *s = w->shard;
    if (w->control->placement == SP_PLACE_COPY && d->kind == SP_DESC_PAGES)
        atomic_store_explicit(&s->slots_freed, d->slot + d->pages, memory_order_release);
    if (d->kind == SP_DESC_DISCARD)
        atomic_fetch_add(&s->discards_done, 1);
    uint64_t tail = atomic_load_explicit(&s->background.tail, memory_order_relaxed) + n_desc;
    atomic_store(&s->background.tail, tail);
    if (worth_a_ring(s, tail))
        sp_bell_ring(&s->space);
}

static int take_batch(sp_worker *w, bool *any)
{
    const sp_desc *first = sp_ring_peek(&w->shard->background);
    if (!first)
        return 0;
    *any = true;
    sp_desc d = *first;
    uint64_t n = 1;
    while (n < 64 && join(w, &d, peek_at(&w->shard->background, n)))
        n++;
    int rc = obey(w, &d);
    if (rc == 0)
        finish(w, &d, n);
    return rc;
}

/* Between two rounds no guest's descriptor is in use here: those that leave are let go. */
static void let_go(sp_worker *w)
{
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++)
        if (atomic_load(&w->guests[i].state) == SP_GUEST_LEAVING)
            atomic_store(&w->guests[i].state, SP_GUEST_FREE);
}

static bool map_ahead(sp_worker *w)
{
    return w->control->placement == SP_PLACE_CONTINUE && sp_map_ahead(w);
}

/* A guest may have come since the last look: it is mapped for once more before the sleep. */
static void sleep_until_work(sp_worker *w)
{
    sp_shard *s = w->shard;
    uint32_t seen = sp_bell_prepare(&s->work);
    if (atomic_load(&w->stop) || sp_ring_peek(&s->urgent) || sp_ring_peek(&s->background) ||
        map_ahead(w)) {
        sp_bell_cancel(&s->work);
        return;
    }
    sp_bell_wait(&s->work, seen, IDLE_MS);
}

sp_status sp_worker_place(sp_worker *w)
{
    int rc = 0;
    atomic_store(&w->placing, 1);
    while (!atomic_load(&w->stop)) {
        bool any = false;
        beat(w);
        let_go(w);
        rc = hurry(w, &any);
        if (rc == 0)
            rc = take_batch(w, &any);
        if (rc != 0)
            break;
        any |= map_ahead(w);
        if (!any)
            sleep_until_work(w);
    }
    atomic_store(&w->placing, 0);
    if (rc == 0)
        return SP_STOPPED;
    w->err = -rc;
    return SP_SYS;
}
