/* A worker's set-up, its guests and its latency samples. */
#define _GNU_SOURCE
#include "shard/worker.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel/uffd.h"
#include "kernel/uffd_abi.h"

sp_worker *sp_worker_new(sp_control *c, uint32_t index, uint8_t *pool, sp_word *received,
                         sp_word *requested, sp_word *written, int uffd)
{
    sp_worker *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->control = c;
    w->shard = &c->shards[index];
    w->index = index;
    w->pool = pool;
    w->received = received;
    w->requested = requested;
    w->written = written;
    w->uffd = uffd;
    w->back_fd = -1;
    return w;
}

void sp_worker_free(sp_worker *w)
{
    free(w);
}

int sp_worker_add_block(sp_worker *w, uint32_t block, uint8_t *base, int fd)
{
    const sp_block *b = &w->control->blocks[block];
    w->base[block] = base;
    w->fd[block] = fd;
    if (!base)
        return 0;
    uint64_t ioctls = 0, needed = UFFDIO_BIT_WAKE | UFFDIO_BIT_COPY | UFFDIO_BIT_ZEROPAGE;
    int rc = sp_uffd_register(w->uffd, (uint64_t)(uintptr_t)base, b->bytes,
                              UFFDIO_REGISTER_MODE_MISSING, &ioctls);
    if (rc == 0 && (ioctls & needed) != needed)
        rc = -EOPNOTSUPP;
    return rc;
}

void sp_worker_stop(sp_worker *w)
{
    atomic_store(&w->stop, 1);
    sp_bell_ring(&w->shard->work);
}

/* Calls f for each run of bytes of this shard in the guest's mapping of a block. */
static int each_stripe(sp_worker *w, uint32_t block, int (*f)(void *, uint64_t, uint64_t),
                       void *arg)
{
    const sp_block *b = &w->control->blocks[block];
    uint64_t pages = sp_block_pages(b);
    for (uint64_t page = 0, n; page < pages; page += n) {
        n = sp_stripe_rest(w->control, b, page);
        if (sp_shard_of(w->control, b, page) != w->index)
            continue;
        int rc = f(arg, page * SP_PAGE_BYTES, n * SP_PAGE_BYTES);
        if (rc)
            return rc;
    }
    return 0;
}

typedef struct stripe_call {
    int uffd;
    uint64_t base, mode;
} stripe_call;

static int register_stripe(void *arg, uint64_t offset, uint64_t bytes)
{
    stripe_call *s = arg;
    return sp_uffd_register(s->uffd, s->base + offset, bytes, s->mode, NULL);
}

/* The guest may have unmapped or died: that is no failure of ours. */
static int unregister_stripe(void *arg, uint64_t offset, uint64_t bytes)
{
    stripe_call *s = arg;
    sp_uffd_unregister(s->uffd, s->base + offset, bytes);
    return 0;
}

static int wake_stripe(void *arg, uint64_t offset, uint64_t bytes)
{
    stripe_call *s = arg;
    sp_uffd_wake(s->uffd, s->base + offset, bytes);
    return 0;
}

int sp_worker_add_guest(sp_worker *w, uint32_t guest, int uffd, const uint64_t *base,
                        uint64_t mode, uint32_t *bad)
{
    sp_guest *g = &w->guests[guest];
    uint32_t n = atomic_load(&w->control->n_blocks);
    if (atomic_load(&g->state) != SP_GUEST_FREE)
        return -EBUSY;
    /* A blocking read is 10 us faster than poll and read; the flag is the open file's. */
    if (fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) & ~O_NONBLOCK))
        return -errno;
    for (*bad = 0; *bad < n; ++*bad) {
        stripe_call call = {uffd, base[*bad], mode};
        int rc = base[*bad] ? each_stripe(w, *bad, register_stripe, &call) : 0;
        if (rc)
            return rc;
    }
    g->uffd = uffd;
    g->ahead_block = 0;
    g->ahead_page = 0;
    memcpy(g->base, base, n * sizeof *base);
    atomic_store(&g->stop, 0);
    atomic_store(&g->state, SP_GUEST_ACTIVE);
    /* A guest that comes again may wait for pages that were placed while nobody woke it. */
    for (uint32_t i = 0; i < n; i++)
        if (base[i])
            sp_uffd_wake(uffd, base[i], w->control->blocks[i].bytes);
    sp_bell_ring(&w->shard->work); /* there may be pages to map ahead */
    return 0;
}

void sp_worker_listen(sp_worker *w, int back_fd)
{
    w->back_fd = back_fd;
    atomic_store(&w->listening, 1);
    sp_bell_ring(&w->shard->work);
}

static void only_interrupt(int signo)
{
    (void)signo;
}

int sp_allow_interrupts(int signo)
{
    struct sigaction action = {.sa_handler = only_interrupt}; /* no SA_RESTART: that is the point */
    return sigaction(signo, &action, NULL) ? -errno : 0;
}

void sp_worker_stop_guest(sp_worker *w, uint32_t guest)
{
    atomic_store(&w->guests[guest].stop, 1);
}

static void for_blocks(sp_worker *w, sp_guest *g, int (*f)(void *, uint64_t, uint64_t))
{
    uint32_t n = atomic_load(&w->control->n_blocks);
    for (uint32_t block = 0; block < n; block++) {
        stripe_call call = {g->uffd, g->base[block], 0};
        if (g->base[block])
            each_stripe(w, block, f, &call);
    }
}

void sp_worker_drop_guest(sp_worker *w, uint32_t guest, int release)
{
    sp_guest *g = &w->guests[guest];
    if (atomic_load(&g->state) != SP_GUEST_ACTIVE)
        return;
    if (release)
        for_blocks(w, g, unregister_stripe);
    /* The placement loop may be using the descriptor: it confirms between two rounds. */
    atomic_store(&g->state, SP_GUEST_LEAVING);
    while (atomic_load(&g->state) != SP_GUEST_FREE && atomic_load(&w->placing)) {
        sp_bell_ring(&w->shard->work);
        usleep(200);
    }
    atomic_store(&g->state, SP_GUEST_FREE);
}

void sp_worker_wake_all(sp_worker *w)
{
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++)
        if (atomic_load(&w->guests[i].state) == SP_GUEST_ACTIVE)
            for_blocks(w, &w->guests[i], wake_stripe);
}
