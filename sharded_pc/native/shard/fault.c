/* The fault side of a worker: one loop per attached guest. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernel/map.h"
#include "kernel/uffd.h"
#include "kernel/uffd_abi.h"
#include "shard/place.h"
#include "shard/request.h"
#include "shard/wake.h"

enum { BATCH = 64, AROUND = 16 };

typedef struct fault {
    uint32_t block;
    uint64_t page;
} fault;

/* Which of our pages the address is; false if it is none of this shard's. */
static bool find_page(const sp_worker *w, const sp_guest *g, uint64_t addr, fault *f)
{
    uint32_t n = atomic_load(&w->control->n_blocks);
    for (uint32_t i = 0; i < n; i++) {
        const sp_block *b = &w->control->blocks[i];
        if (!g->base[i] || addr < g->base[i] || addr - g->base[i] >= b->bytes)
            continue;
        f->block = i;
        f->page = (addr - g->base[i]) / SP_PAGE_BYTES;
        return sp_shard_of(w->control, b, f->page) == w->index;
    }
    return false;
}

/* The page is here: the waiter goes on.  A page with data only needs a wake; a hole (zeros) is
 * filled, mapped and woken by one call through the guest's own userfaultfd; where that does not do,
 * by ours and a wake.  False if the hole could not be filled. */
static bool answer(sp_worker *w, uint32_t guest, const fault *f)
{
    off_t at = (off_t)(f->page * SP_PAGE_BYTES);
    uint64_t addr = w->guests[guest].base[f->block] + f->page * SP_PAGE_BYTES;
    sp_fill_result res;
    if (lseek(w->fd[f->block], at, SEEK_DATA) != at) {
        if (sp_uffd_zeropage(w->guests[guest].uffd, addr, SP_PAGE_BYTES, 1, &res) == SP_FILL_DONE)
            return true;
        if (sp_fill_hole(w, f->block, f->page))
            return false;
    }
    sp_wake_guests(w, (int)guest, f->block, f->page, 1);
    return true;
}

/* `continue`: a guest that came to a page that is here will often come to the next ones. */
static bool answer_mapped(sp_worker *w, uint32_t guest, const fault *f)
{
    const sp_block *b = &w->control->blocks[f->block];
    sp_window at = {w->guests[guest].uffd, w->fd[f->block], w->guests[guest].base[f->block]};
    uint64_t most = sp_stripe_rest(w->control, b, f->page);
    uint64_t run = sp_bits_run(w->received, b->first_bit + f->page, most < AROUND ? most : AROUND);
    int err = 0;
    return sp_map_waited(&at, f->page, run, &err);
}

static bool resolve(sp_worker *w, uint32_t guest, const fault *f)
{
    return w->control->placement == SP_PLACE_CONTINUE ? answer_mapped(w, guest, f)
                                                      : answer(w, guest, f);
}

static bool stopped(sp_worker *w, uint32_t guest)
{
    return atomic_load(&w->stop) || atomic_load(&w->guests[guest].stop);
}

/* While the way back is lost the claimed bit says it all: the page is asked for when there is one. */
static void request(sp_worker *w, uint32_t guest, const fault *f)
{
    sp_desc d = {f->page, 1, 0, f->block, SP_DESC_REQUEST};
    sp_count(&w->shard->counters.requests, 1);
    if (atomic_load(&w->control->back_lost) ||
        (w->back_fd >= 0 && sp_rp_request(w->control, w->back_fd, w->index, f->block, f->page)))
        return;
    while (!sp_ring_push(&w->shard->requests[guest], &d)) {
        sp_bell_ring(&w->control->requests);
        if (stopped(w, guest) || atomic_load(&w->control->back_lost))
            return;
        sched_yield();
    }
    sp_bell_ring(&w->control->requests);
}

/* Whether this fault has to ask for its page: one request is enough for a page of the source's
 * memory.  Its last page arrives last, so its bits say whether that request is on its way; the bits
 * are set before the request, so one that is lost is asked for again (back/outstanding.h). */
static bool claim(sp_worker *w, const fault *f)
{
    const sp_block *b = &w->control->blocks[f->block];
    if (!sp_bit_claim(w->requested, b->first_bit + f->page))
        return false;
    uint64_t last = sp_source_last(b, f->page);
    return last == f->page || sp_bit_claim(w->requested, b->first_bit + last) ||
           sp_bit_test(w->received, b->first_bit + last);
}

static bool handle(sp_worker *w, uint32_t guest, const fault *f, uint64_t now)
{
    uint64_t bit = w->control->blocks[f->block].first_bit + f->page;
    if (sp_bit_test(w->received, bit)) {
        sp_count(&w->shard->counters.late_faults, 1);
        bool ok = resolve(w, guest, f);
        sp_latency_add(w->shard, sp_now_ns() - now);
        return ok;
    }
    sp_waiter_note(w->shard, bit, now);
    if (claim(w, f))
        request(w, guest, f);
    /* The page may have come before the claim was visible to the placement loop: look again. */
    if (!sp_bit_test(w->received, bit))
        return true;
    bool ok = resolve(w, guest, f);
    sp_waiter_end(w->shard, bit, sp_now_ns());
    return ok;
}

static int by_page(const void *a, const void *b)
{
    const fault *x = a, *y = b;
    if (x->block != y->block)
        return x->block < y->block ? -1 : 1;
    return x->page < y->page ? -1 : x->page > y->page;
}

static bool same(const fault *a, const fault *b)
{
    return a->block == b->block && a->page == b->page;
}

/* Several threads often wait for one page: one answer does for all of them. */
static sp_status handle_batch(sp_worker *w, uint32_t guest, const struct uffd_msg *msg, int n,
                              int *err, uint64_t *err_addr)
{
    fault faults[BATCH];
    int k = 0;
    uint64_t now = sp_now_ns();
    for (int i = 0; i < n; i++) {
        if (msg[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        *err_addr = msg[i].pagefault.address;
        if (!find_page(w, &w->guests[guest], *err_addr, &faults[k])) {
            *err = EFAULT;
            return SP_SYS;
        }
        k++;
    }
    sp_count(&w->shard->counters.faults, (uint64_t)k);
    if (k > 1)
        qsort(faults, (size_t)k, sizeof *faults, by_page);
    for (int i = 0; i < k; i++) {
        if (i && same(&faults[i], &faults[i - 1])) {
            sp_count(&w->shard->counters.lost_samples, 1);
            continue;
        }
        if (!handle(w, guest, &faults[i], now)) {
            *err = ENOSPC;
            return SP_SYS;
        }
    }
    return SP_OK;
}

sp_status sp_worker_faults(sp_worker *w, uint32_t guest, int *err, uint64_t *err_addr)
{
    struct uffd_msg msg[BATCH];
    int uffd = w->guests[guest].uffd;
    while (!stopped(w, guest)) {
        ssize_t n = read(uffd, msg, sizeof msg);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) { /* somebody made it non-blocking again */
            struct pollfd p = {.fd = uffd, .events = POLLIN};
            poll(&p, 1, 100);
            continue;
        }
        if (n < (ssize_t)sizeof *msg) {
            *err = n < 0 ? errno : EIO;
            return SP_SYS;
        }
        sp_status st = handle_batch(w, guest, msg, (int)((size_t)n / sizeof *msg), err, err_addr);
        if (st != SP_OK)
            return st;
    }
    return SP_STOPPED;
}
