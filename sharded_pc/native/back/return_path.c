#define _GNU_SOURCE
#include "back/return_path.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/message.h"

enum { MOST_PAGES = 1 << 18 /* QEMU reads an int of bytes */ };
enum { IDLE_MS = 1000, WIRE_STUCK_MS = 200 };

/* QEMU migration/ram.c RAMBLOCK_RECV_BITMAP_ENDING */
static const uint64_t BITMAP_END = 0x0123456789abcdefULL;

sp_return_path *sp_rp_new(sp_control *c, int fd)
{
    sp_return_path *rp = calloc(1, sizeof *rp);
    if (!rp)
        return NULL;
    rp->control = c;
    rp->fd = fd;
    rp->last_block = UINT32_MAX;
    pthread_mutex_init(&rp->lock, NULL);
    return rp;
}

void sp_rp_free(sp_return_path *rp)
{
    pthread_mutex_destroy(&rp->lock);
    free(rp);
}

int sp_rp_post(sp_return_path *rp, const uint8_t *msg, size_t len)
{
    int rc = -ENOBUFS;
    pthread_mutex_lock(&rp->lock);
    if (rp->n_outbox + len <= sizeof rp->outbox) {
        memcpy(rp->outbox + rp->n_outbox, msg, len);
        rp->n_outbox += len;
        if (len > 2 && (msg[1] == MSG_REQ_PAGES_ID || msg[1] == MSG_REQ_PAGES))
            sp_count(&rp->control->totals.requests_sent, 1);
        atomic_store(&rp->posted, 1);
        rc = 0;
    }
    pthread_mutex_unlock(&rp->lock);
    sp_bell_ring(&rp->control->requests);
    return rc;
}

void sp_rp_arm(sp_return_path *rp, const sp_word *received, const sp_word *requested)
{
    rp->received = received;
    rp->requested = requested;
    atomic_store(&rp->control->back_lost, 0);
    atomic_store(&rp->again, 1);
    atomic_store(&rp->armed, 1);
    sp_bell_ring(&rp->control->requests);
}

void sp_rp_again(sp_return_path *rp)
{
    atomic_store(&rp->again, 1);
    sp_bell_ring(&rp->control->requests);
}

int sp_rp_bitmap(sp_return_path *rp, const sp_word *received, uint32_t block)
{
    int rc = -ENOBUFS;
    pthread_mutex_lock(&rp->lock);
    if (rp->n_bitmaps < SP_MAX_BLOCKS) {
        rp->received = received;
        rp->bitmaps[rp->n_bitmaps++] = block;
        atomic_store(&rp->posted, 1);
        rc = 0;
    }
    pthread_mutex_unlock(&rp->lock);
    sp_bell_ring(&rp->control->requests);
    return rc;
}

void sp_rp_stop(sp_return_path *rp)
{
    atomic_store(&rp->stop, 1);
    sp_bell_ring(&rp->control->requests);
}

static void put_request(sp_return_path *rp, const sp_desc *d)
{
    bool named = d->block != rp->last_block;
    rp->n_out += sp_put_request(rp->control, rp->out + rp->n_out, d, named);
    rp->last_block = d->block;
    sp_count(&rp->control->totals.requests_sent, 1);
}

/* True if something is to be written, which may be a bitmap alone. */
static bool take_outbox(sp_return_path *rp)
{
    if (!atomic_load(&rp->posted))
        return false;
    pthread_mutex_lock(&rp->lock);
    memcpy(rp->out + rp->n_out, rp->outbox, rp->n_outbox);
    rp->n_out += rp->n_outbox;
    rp->n_outbox = 0;
    rp->last_block = UINT32_MAX; /* what was posted may have named a block */
    atomic_store(&rp->posted, 0);
    pthread_mutex_unlock(&rp->lock);
    return true;
}

static void take_requests(sp_return_path *rp)
{
    if (!atomic_load(&rp->armed))
        return;
    for (uint32_t i = 0; i < rp->control->n_shards; i++)
        for (uint32_t g = 0; g < SP_MAX_GUESTS; g++) {
            sp_ring *ring = &rp->control->shards[i].requests[g];
            const sp_desc *d;
            while (rp->n_out + LARGEST_REQUEST <= sizeof rp->out && (d = sp_ring_peek(ring))) {
                put_request(rp, d);
                sp_ring_pop(ring);
            }
        }
}

/* The first run of pages from the loop's place on that are requested and not received; false: there
 * is none any more. */
static bool next_outstanding(sp_return_path *rp, sp_desc *d)
{
    uint32_t n_blocks = atomic_load(&rp->control->n_blocks);
    for (; rp->again_block < n_blocks; rp->again_block++, rp->again_page = 0) {
        const sp_block *b = &rp->control->blocks[rp->again_block];
        for (uint64_t pages = sp_block_pages(b), run; rp->again_page < pages;) {
            uint64_t page = rp->again_page, bit = b->first_bit + page;
            run = sp_bits_run(rp->requested, bit, pages - page);
            if (sp_bit_test(rp->requested, bit)) {
                run = sp_bits_run(rp->received, bit, run < MOST_PAGES ? run : MOST_PAGES);
                if (!sp_bit_test(rp->received, bit))
                    *d = (sp_desc){page, run, 0, rp->again_block, SP_DESC_REQUEST};
            }
            rp->again_page += run;
            if (d->pages)
                return true;
        }
    }
    return false;
}

static void take_outstanding(sp_return_path *rp)
{
    if (!atomic_load(&rp->armed))
        return;
    if (atomic_exchange(&rp->again, 0))
        rp->again_page = rp->again_block = 0;
    while (rp->n_out + LARGEST_REQUEST <= sizeof rp->out) {
        sp_desc d = {0};
        if (!next_outstanding(rp, &d))
            return;
        put_request(rp, &d);
    }
}

static sp_status broken(sp_return_path *rp, int err)
{
    rp->err = err;
    return SP_SYS;
}

/* Waits for room on the wire; a stopped receiver gives a stuck peer one more chance. */
static sp_status await_room(sp_return_path *rp)
{
    struct pollfd p = {.fd = rp->fd, .events = POLLOUT};
    int n = poll(&p, 1, WIRE_STUCK_MS);
    if (n < 0 && errno != EINTR)
        return broken(rp, errno);
    return n == 0 && atomic_load(&rp->stop) ? SP_STOPPED : SP_OK;
}

static sp_status write_out(sp_return_path *rp)
{
    for (size_t done = 0; done < rp->n_out;) {
        ssize_t n = write(rp->fd, rp->out + done, rp->n_out - done);
        sp_status st = SP_OK;
        if (n >= 0)
            done += (size_t)n;
        else if (errno == EAGAIN)
            st = await_room(rp);
        else if (errno != EINTR)
            st = broken(rp, errno);
        if (st != SP_OK)
            return st;
    }
    atomic_fetch_add(&rp->sent, rp->n_out);
    return SP_OK;
}

/* Fault loops write for microseconds, and what was posted before a stop has to go out; the word of one
 * that died is taken back (sp_rp_take_back). */
static bool take_turn(sp_return_path *rp)
{
    uint32_t nobody = 0;
    uint64_t until = 0;
    while (!atomic_compare_exchange_strong(&rp->control->back_writer, &nobody, SP_BACK_LOOP)) {
        if (atomic_load(&rp->stop) && until == 0)
            until = sp_now_ns() + WIRE_STUCK_MS * 1000000ULL;
        if (until && sp_now_ns() > until)
            return false;
        nobody = 0;
        sched_yield();
    }
    return true;
}

/* A block whose received bitmap is wanted; UINT32_MAX: none. */
static uint32_t take_bitmap(sp_return_path *rp)
{
    uint32_t block = UINT32_MAX;
    pthread_mutex_lock(&rp->lock);
    if (rp->n_bitmaps) {
        block = rp->bitmaps[0];
        memmove(rp->bitmaps, rp->bitmaps + 1, --rp->n_bitmaps * sizeof *rp->bitmaps);
    }
    pthread_mutex_unlock(&rp->lock);
    return block;
}

static sp_status flush_out(sp_return_path *rp)
{
    sp_status st = write_out(rp);
    rp->n_out = 0;
    return st;
}

static sp_status write_bitmap(sp_return_path *rp, uint32_t block)
{
    const sp_block *b = &rp->control->blocks[block];
    size_t len = strnlen(b->name, sizeof b->name);
    sp_status st = SP_OK;
    uint64_t words = (sp_block_pages(b) + 63) / 64;
    uint8_t *at = sp_put(sp_put(rp->out, MSG_RECV_BITMAP, 2), 1 + len, 2);
    at = sp_put(at, len, 1);
    memcpy(at, b->name, len);
    rp->n_out = (size_t)(sp_put(at + len, words * 8, 8) - rp->out);
    for (uint64_t i = 0; i < words; i++, rp->n_out += 8) {
        if (rp->n_out + 8 > sizeof rp->out && (st = flush_out(rp)) != SP_OK)
            return st;
        uint64_t word = htole64(atomic_load(&rp->received[b->first_bit / 64 + i]));
        memcpy(rp->out + rp->n_out, &word, 8);
    }
    if ((st = flush_out(rp)) != SP_OK)
        return st;
    rp->n_out = (size_t)(sp_put(rp->out, BITMAP_END, 8) - rp->out);
    return flush_out(rp);
}

static sp_status send_out(sp_return_path *rp)
{
    sp_status st = SP_OK;
    uint32_t block;
    if (rp->fd >= 0) {
        if (!take_turn(rp))
            return SP_STOPPED;
        st = write_out(rp);
        while (st == SP_OK && (block = take_bitmap(rp)) != UINT32_MAX)
            st = write_bitmap(rp, block);
        atomic_store(&rp->control->back_writer, 0);
    }
    rp->n_out = 0;
    rp->last_block = UINT32_MAX; /* another's message may name one in between */
    return st;
}

sp_status sp_rp_loop(sp_return_path *rp)
{
    for (;;) {
        uint32_t seen = sp_bell_prepare(&rp->control->requests);
        uint32_t stop = atomic_load(&rp->stop);
        bool posted = take_outbox(rp);
        take_outstanding(rp);
        take_requests(rp);
        if (posted || rp->n_out) {
            sp_bell_cancel(&rp->control->requests);
            sp_status st = send_out(rp);
            if (st != SP_OK)
                return st;
        } else if (stop) {
            sp_bell_cancel(&rp->control->requests);
            return SP_STOPPED;
        } else {
            sp_bell_wait(&rp->control->requests, seen, IDLE_MS);
        }
    }
}
