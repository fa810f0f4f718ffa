#define _GNU_SOURCE
#include "lab/floor.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernel/uffd.h"
#include "kernel/uffd_abi.h"

enum { WAIT_MS = 100, STREAM_BATCH = 64, MESSAGES = 64 };

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Placement */

static int copy_pages(const sp_floor *f, uint64_t page, uint64_t pages, const uint8_t *src)
{
    sp_fill_result res;
    sp_fill fill = sp_uffd_copy(f->uffd, (uint64_t)(uintptr_t)f->base + page * SP_PAGE_BYTES,
                                (uint64_t)(uintptr_t)src, pages * SP_PAGE_BYTES, 0, &res);
    if (fill == SP_FILL_DONE)
        return 0;
    return fill == SP_FILL_FAILED ? -res.err : -EAGAIN;
}

int sp_floor_place(const sp_floor *f, uint64_t stripe_pages, uint64_t batch, uint64_t *ns)
{
    uint64_t start = sp_now_ns(), slot = 0;
    for (uint64_t stripe = 0; stripe < f->pages; stripe += stripe_pages) {
        uint64_t left = least(stripe_pages, f->pages - stripe);
        while (left) {
            uint64_t n = least(left, batch);
            left -= n;
            slot = slot + n > SP_POOL_SLOTS ? 0 : slot;
            int rc = copy_pages(f, stripe + left, n, f->pool + slot * SP_PAGE_BYTES);
            if (rc)
                return rc;
            slot += n;
        }
    }
    *ns = sp_now_ns() - start;
    return 0;
}

/* Reads the next n records whole; their payloads land in the pool from `slot` on. */
static int receive(const sp_floor *f, int sock, uint64_t slot, uint64_t n, size_t first_header)
{
    uint8_t headers[STREAM_BATCH + 1][8], name[512];
    struct iovec iov[2 * STREAM_BATCH];
    size_t want = n * SP_PAGE_BYTES + (n - 1) * 8 + first_header;
    for (uint64_t i = 0; i < n; i++) {
        iov[2 * i] = (struct iovec){headers[i], 8};
        iov[2 * i + 1] = (struct iovec){
            (uint8_t *)(uintptr_t)f->pool + (slot + i) * SP_PAGE_BYTES, SP_PAGE_BYTES};
    }
    if (first_header > sizeof name)
        return -EINVAL;
    iov[0] = (struct iovec){name, first_header};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2 * n};
    ssize_t got = recvmsg(sock, &msg, MSG_WAITALL);
    if (got < 0)
        return -errno;
    return (size_t)got == want ? 0 : -EIO;
}

int sp_floor_stream(const sp_floor *f, int sock, size_t first_header, uint64_t *ns)
{
    uint64_t start = sp_now_ns();
    for (uint64_t page = 0, n; page < f->pages; page += n) {
        n = least(STREAM_BATCH, f->pages - page);
        uint64_t slot = page % SP_POOL_SLOTS;
        int rc = receive(f, sock, slot, n, page ? 8 : first_header);
        if (rc == 0)
            rc = copy_pages(f, page, n, f->pool + slot * SP_PAGE_BYTES);
        if (rc)
            return rc;
    }
    *ns = sp_now_ns() - start;
    return 0;
}

/* Touching */

typedef struct toucher {
    pthread_t thread;
    pthread_barrier_t *start;
    const uint8_t *base;
    const uint64_t *pages;
    size_t first, step, n;
    uint64_t *latency_ns;
    size_t wrong;
    uint8_t expected;
} toucher;

static void *touch(void *arg)
{
    toucher *t = arg;
    pthread_barrier_wait(t->start);
    for (size_t i = t->first; i < t->n; i += t->step) {
        uint64_t before = sp_now_ns();
        uint8_t byte = *(const volatile uint8_t *)(t->base + t->pages[i] * SP_PAGE_BYTES);
        t->latency_ns[i] = sp_now_ns() - before;
        t->wrong += byte != t->expected;
    }
    return NULL;
}

int sp_touch_pages(const uint8_t *base, const uint64_t *pages, size_t n, uint32_t threads,
                   uint8_t expected, uint64_t *latency_ns, size_t *wrong, uint64_t *ns)
{
    pthread_barrier_t start;
    toucher *all = calloc(threads, sizeof *all);
    if (!all || pthread_barrier_init(&start, NULL, threads + 1)) {
        free(all);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < threads; i++) {
        all[i] = (toucher){.start = &start, .base = base, .pages = pages, .first = i,
                           .step = threads, .n = n, .latency_ns = latency_ns,
                           .expected = expected};
        /* Those that run already wait at the barrier for ever: a benchmark can only give up. */
        if (pthread_create(&all[i].thread, NULL, touch, &all[i]))
            abort();
    }
    pthread_barrier_wait(&start);
    uint64_t began = sp_now_ns();
    *wrong = 0;
    for (uint32_t i = 0; i < threads; i++) {
        pthread_join(all[i].thread, NULL);
        *wrong += all[i].wrong;
    }
    *ns = sp_now_ns() - began;
    pthread_barrier_destroy(&start);
    free(all);
    return 0;
}

/* Faults in one process */

typedef struct handler {
    const sp_floor *floor;
    uint64_t left; /* pages nobody touched yet */
    int zero, err;
} handler;

/* Makes the page of a fault present, which wakes whoever waits.  0, or errno. */
static int resolve(handler *h, uint64_t address)
{
    const sp_floor *f = h->floor;
    uint64_t at = address & ~(uint64_t)(SP_PAGE_BYTES - 1);
    struct uffdio_copy copy = {at, (uint64_t)(uintptr_t)f->pool, SP_PAGE_BYTES, 0, 0};
    struct uffdio_zeropage zero = {{at, SP_PAGE_BYTES}, 0, 0};
    int rc;
    do {
        rc = h->zero ? ioctl(f->uffd, UFFDIO_ZEROPAGE, &zero) : ioctl(f->uffd, UFFDIO_COPY, &copy);
    } while (rc && errno == EAGAIN);
    if (rc && errno == EEXIST)
        return -sp_uffd_wake(f->uffd, at, SP_PAGE_BYTES);
    if (rc)
        return errno;
    h->left--;
    return 0;
}

static void *handle_faults(void *arg)
{
    handler *h = arg;
    const sp_floor *f = h->floor;
    struct uffd_msg msg[MESSAGES];
    while (h->left && !h->err) {
        ssize_t got = read(f->uffd, msg, sizeof msg);
        if (got < 0 && errno != EINTR)
            h->err = errno;
        for (ssize_t i = 0; !h->err && i < got / (ssize_t)sizeof *msg; i++)
            h->err = resolve(h, msg[i].pagefault.address);
    }
    if (h->err) /* whoever waits shall not wait for ever: it reads zeros and we say why */
        sp_uffd_unregister(f->uffd, (uint64_t)(uintptr_t)f->base, f->pages * SP_PAGE_BYTES);
    return NULL;
}

int sp_floor_faults(const sp_floor *f, const uint64_t *pages, size_t n, uint32_t threads, int zero,
                    uint64_t *latency_ns, size_t *wrong, uint64_t *ns)
{
    handler h = {f, n, zero, 0};
    pthread_t thread;
    int rc = pthread_create(&thread, NULL, handle_faults, &h);
    if (rc)
        return -rc;
    rc = sp_touch_pages(f->base, pages, n, threads, zero ? 0 : f->pool[0], latency_ns, wrong, ns);
    if (rc)
        abort(); /* the handler waits for faults that nobody will raise */
    pthread_join(thread, NULL);
    return -h.err;
}

/* Feeding the product's workers */

static bool has_tmp_pages(sp_shard *s, uint64_t n)
{
    uint64_t taken = atomic_load_explicit(&s->slots_taken, memory_order_relaxed);
    return SP_POOL_SLOTS - (taken - atomic_load(&s->slots_freed)) >= n;
}

static bool has_room(sp_shard *s, uint64_t tmp_pages)
{
    uint64_t head = atomic_load_explicit(&s->background.head, memory_order_relaxed);
    return head - atomic_load(&s->background.tail) < SP_RING_SLOTS && has_tmp_pages(s, tmp_pages);
}

static bool is_idle(sp_shard *s, uint64_t unused)
{
    (void)unused;
    return atomic_load(&s->background.head) == atomic_load(&s->background.tail);
}

/* Sleeps until the worker makes `ready` true, as route.c does. */
static sp_status await(sp_shard *s, bool (*ready)(sp_shard *, uint64_t), uint64_t n,
                       _Atomic uint32_t *stop)
{
    while (!ready(s, n)) {
        uint32_t seen = sp_bell_prepare(&s->space);
        if (atomic_load(stop) || atomic_load(&s->failed) || ready(s, n)) {
            sp_bell_cancel(&s->space);
            if (atomic_load(stop))
                return SP_STOPPED;
            if (atomic_load(&s->failed))
                return SP_SHARD_FAILED;
            continue;
        }
        sp_bell_wait(&s->space, seen, WAIT_MS);
    }
    return SP_OK;
}

/* n tmp pages that are neighbours; the caller knows that there is room. */
static uint64_t take_tmp_pages(sp_shard *s, uint64_t n)
{
    uint64_t slot = atomic_load_explicit(&s->slots_taken, memory_order_relaxed);
    if (slot % SP_POOL_SLOTS + n > SP_POOL_SLOTS)
        slot += SP_POOL_SLOTS - slot % SP_POOL_SLOTS; /* freed with what comes behind them */
    atomic_store_explicit(&s->slots_taken, slot + n, memory_order_relaxed);
    return slot;
}

typedef struct feed {
    sp_control *control;
    uint32_t block, kind;
    uint64_t batch;
    struct cursor {
        uint64_t page, left; /* of the stripe: its first page, and how many were not fed yet */
        uint64_t next;       /* where the next stripe starts */
    } at[SP_MAX_SHARDS];
} feed;

/* False when the shard's last stripe was fed. */
static bool enter_stripe(feed *f, uint32_t shard)
{
    const sp_block *b = &f->control->blocks[f->block];
    struct cursor *at = &f->at[shard];
    while (at->left == 0 && at->next < sp_block_pages(b)) {
        uint64_t pages = sp_stripe_rest(f->control, b, at->next);
        at->page = at->next;
        at->left = sp_shard_of(f->control, b, at->page) == shard ? pages : 0;
        at->next += pages;
    }
    return at->left > 0;
}

static void feed_one(feed *f, uint32_t shard)
{
    sp_shard *s = &f->control->shards[shard];
    struct cursor *at = &f->at[shard];
    uint64_t n = least(at->left, f->batch);
    at->left -= n;
    sp_desc d = {at->page + at->left, n, 0, f->block, f->kind};
    if (f->kind == SP_DESC_PAGES)
        d.slot = take_tmp_pages(s, n);
    if (f->kind == SP_DESC_DISCARD)
        atomic_fetch_add(&s->discards_sent, 1);
    sp_ring_push(&s->background, &d);
    sp_bell_ring(&s->work);
}

/* One round: whatever fits.  How many shards are not finished; *stuck is one of them that is full,
 * if none could be fed. */
static uint32_t feed_round(feed *f, uint32_t *stuck)
{
    uint64_t room = f->kind == SP_DESC_PAGES ? 2 * f->batch : 0; /* see take_tmp_pages */
    uint32_t unfinished = 0, full = UINT32_MAX;
    bool fed = false;
    for (uint32_t i = 0; i < f->control->n_shards; i++) {
        if (!enter_stripe(f, i))
            continue;
        unfinished++;
        if (has_room(&f->control->shards[i], room)) {
            feed_one(f, i);
            fed = true;
        } else if (full == UINT32_MAX) {
            full = i;
        }
    }
    *stuck = fed ? UINT32_MAX : full;
    return unfinished;
}

sp_status sp_feed_block(sp_control *c, uint32_t block, uint32_t kind, uint64_t batch,
                        _Atomic uint32_t *stop, uint64_t *ns)
{
    feed f = {.control = c, .block = block, .kind = kind, .batch = batch};
    uint64_t start = sp_now_ns();
    uint64_t room = kind == SP_DESC_PAGES ? SP_POOL_SLOTS / 2 : 0;
    sp_status st = SP_OK;
    uint32_t stuck;
    while (st == SP_OK && feed_round(&f, &stuck))
        if (stuck != UINT32_MAX)
            st = await(&c->shards[stuck], has_room, room, stop);
    for (uint32_t i = 0; st == SP_OK && i < c->n_shards; i++)
        st = await(&c->shards[i], is_idle, 0, stop);
    *ns = sp_now_ns() - start;
    return st;
}

/* As route.c: the guest gets it now (or the worker a hint), then the page has its turn. */
static sp_status serve(const sp_service *f, uint32_t shard, const sp_desc *request)
{
    sp_control *c = f->guests->control;
    sp_shard *s = &c->shards[shard];
    sp_status st = await(s, has_room, 1, f->stop);
    if (st != SP_OK)
        return st;
    sp_desc d = {request->first_page, 1, 0, request->block, SP_DESC_PAGES};
    if (c->placement == SP_PLACE_COPY)
        d.slot = take_tmp_pages(s, 1);
    else
        sp_bits_set(f->received, c->blocks[d.block].first_bit + d.first_page, 1);
    uint64_t at = (uint64_t)shard * SP_POOL_SLOTS + d.slot % SP_POOL_SLOTS;
    if (!sp_guests_give(f->guests, f->received, d.block, d.first_page, f->pool + at * SP_PAGE_BYTES))
        sp_ring_push(&s->urgent, &d);
    sp_ring_push(&s->background, &d);
    sp_bell_ring(&s->work);
    return SP_OK;
}

static sp_status serve_all(const sp_service *f, bool *any)
{
    sp_control *c = f->guests->control;
    for (uint32_t i = 0; i < c->n_shards; i++)
        for (uint32_t g = 0; g < SP_MAX_GUESTS; g++) {
            sp_ring *ring = &c->shards[i].requests[g];
            const sp_desc *d;
            while ((d = sp_ring_peek(ring))) {
                *any = true;
                sp_status st = serve(f, i, d);
                if (st != SP_OK)
                    return st;
                sp_ring_pop(ring);
            }
        }
    return SP_OK;
}

sp_status sp_feed_requests(const sp_service *f)
{
    sp_control *c = f->guests->control;
    while (!atomic_load(f->stop)) {
        bool any = false;
        uint32_t seen = sp_bell_prepare(&c->requests);
        sp_status st = serve_all(f, &any);
        if (st != SP_OK || any || atomic_load(f->stop))
            sp_bell_cancel(&c->requests);
        else
            sp_bell_wait(&c->requests, seen, WAIT_MS);
        if (st != SP_OK)
            return st;
    }
    return SP_STOPPED;
}
