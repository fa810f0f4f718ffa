#define _GNU_SOURCE
#include "back/return_path.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "back/bitmaps.h"
#include "back/outstanding.h"
#include "back/wire.h"
#include "shared/message.h"

enum { IDLE_MS = 1000 };

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

static void take_outstanding(sp_return_path *rp)
{
    if (!atomic_load(&rp->armed))
        return;
    while (rp->n_out + LARGEST_REQUEST <= sizeof rp->out) {
        sp_desc d = {0};
        if (!sp_rp_next_outstanding(rp, &d))
            return;
        put_request(rp, &d);
    }
}

/* Fault loops write for microseconds, and what was posted before a stop has to go out; the word of one
 * that died is taken back (sp_rp_take_back). */
static bool take_turn(sp_return_path *rp)
{
    uint32_t nobody = 0;
    uint64_t until = 0;
    while (!atomic_compare_exchange_strong(&rp->control->back_writer, &nobody, SP_BACK_LOOP)) {
        if (atomic_load(&rp->stop) && until == 0)
            until = sp_now_ns() + SP_WIRE_STUCK_MS * 1000000ULL;
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
        if ((st = sp_rp_flush(rp)) == SP_OK)
            st = sp_rp_write_bitmaps(rp);
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
