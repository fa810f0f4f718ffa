#define _GNU_SOURCE
#include "return_path.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MSG_REQ_PAGES_ID = 3, MSG_REQ_PAGES = 4, LARGEST_REQUEST = 4 + 12 + 1 + 255 };
enum { IDLE_MS = 1000, WIRE_STUCK_MS = 200 };

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

void sp_rp_arm(sp_return_path *rp)
{
    atomic_store(&rp->armed, 1);
    sp_bell_ring(&rp->control->requests);
}

void sp_rp_stop(sp_return_path *rp)
{
    atomic_store(&rp->stop, 1);
    sp_bell_ring(&rp->control->requests);
}

static uint8_t *put(uint8_t *to, uint64_t v, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--)
        *to++ = (uint8_t)(v >> (8 * i));
    return to;
}

/* One request at `to`, with the block's name or without; its length. */
static size_t write_request(const sp_control *c, uint8_t *to, const sp_desc *d, bool named)
{
    const sp_block *b = &c->blocks[d->block];
    size_t len = strnlen(b->name, sizeof b->name);
    uint8_t *at = put(to, named ? MSG_REQ_PAGES_ID : MSG_REQ_PAGES, 2);
    at = put(at, named ? 13 + len : 12, 2);
    at = put(at, d->first_page * SP_PAGE_BYTES, 8);
    at = put(at, d->pages * SP_PAGE_BYTES, 4);
    if (named) {
        at = put(at, len, 1);
        memcpy(at, b->name, len);
        at += len;
    }
    return (size_t)(at - to);
}

static void put_request(sp_return_path *rp, const sp_desc *d)
{
    bool named = d->block != rp->last_block;
    rp->n_out += write_request(rp->control, rp->out + rp->n_out, d, named);
    rp->last_block = d->block;
    sp_count(&rp->control->totals.requests_sent, 1);
}

/* The rest of a message that the wire took a part of: nobody may write before it is whole. */
static bool send_rest(int fd, const uint8_t *bytes, size_t n, const _Atomic uint32_t *stop)
{
    while (n && !atomic_load(stop)) {
        struct pollfd p = {.fd = fd, .events = POLLOUT};
        poll(&p, 1, WIRE_STUCK_MS);
        ssize_t w = send(fd, bytes, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (w < 0 && errno != EAGAIN && errno != EINTR)
            return true; /* the wire is broken: the stream's thread says so */
        if (w > 0) {
            bytes += w;
            n -= (size_t)w;
        }
    }
    return true;
}

bool sp_rp_request(sp_control *c, int fd, uint32_t shard, uint32_t block, uint64_t page,
                   const _Atomic uint32_t *stop)
{
    uint8_t message[LARGEST_REQUEST];
    uint32_t nobody = 0;
    sp_desc d = {page, 1, 0, block, SP_DESC_REQUEST};
    size_t n = write_request(c, message, &d, true);
    if (!atomic_compare_exchange_strong(&c->back_writer, &nobody, shard + 1))
        return false;
    ssize_t w = send(fd, message, n, MSG_DONTWAIT | MSG_NOSIGNAL);
    bool sent = w == (ssize_t)n || (w > 0 && send_rest(fd, message + w, n - (size_t)w, stop));
    atomic_store(&c->back_writer, 0);
    if (sent)
        sp_count(&c->totals.requests_sent, 1);
    return sent;
}

static void take_outbox(sp_return_path *rp)
{
    if (!atomic_load(&rp->posted))
        return;
    pthread_mutex_lock(&rp->lock);
    memcpy(rp->out + rp->n_out, rp->outbox, rp->n_outbox);
    rp->n_out += rp->n_outbox;
    rp->n_outbox = 0;
    rp->last_block = UINT32_MAX; /* what was posted may have named a block */
    atomic_store(&rp->posted, 0);
    pthread_mutex_unlock(&rp->lock);
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

/* Fault loops write for microseconds, and what was posted before a stop has to go out; one that died
 * in the middle has cut its message, and the wire with it. */
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

static sp_status send_out(sp_return_path *rp)
{
    sp_status st = SP_OK;
    if (rp->fd >= 0) {
        if (!take_turn(rp))
            return SP_STOPPED;
        st = write_out(rp);
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
        take_outbox(rp);
        take_requests(rp);
        if (rp->n_out) {
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
