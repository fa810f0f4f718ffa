/* Ring, bell, bitmaps and return path between real threads, for the thread sanitizer.
 *
 * Nothing here looks at a clock: every loop ends when its work is done. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/bell.h"
#include "shared/bitmap.h"
#include "check.h"
#include "back/return_path.h"
#include "shard/request.h"
#include "shared/ring.h"
#include "world.h"

typedef void *(*routine)(void *);

static void run_together(routine a, routine b, void *arg)
{
    pthread_t x, y;
    CHECK_EQ(pthread_create(&x, NULL, a, arg), 0);
    CHECK_EQ(pthread_create(&y, NULL, b, arg), 0);
    CHECK_EQ(pthread_join(x, NULL), 0);
    CHECK_EQ(pthread_join(y, NULL), 0);
}

/* A ring with a bell at each end: a lost ring would leave both asleep for an hour, and the test's
 * time limit would end them. */
enum { MESSAGES = 200000, HOUR_MS = 3600 * 1000 };

typedef struct pipe_of_desc {
    sp_ring ring;
    sp_bell work, space;
} pipe_of_desc;

static void *produce(void *arg)
{
    pipe_of_desc *p = arg;
    for (uint64_t i = 0; i < MESSAGES; i++) {
        sp_desc d = {i, i * 3, i * 5, (uint32_t)i, SP_DESC_PAGES};
        while (!sp_ring_push(&p->ring, &d)) {
            uint32_t seen = sp_bell_prepare(&p->space);
            uint64_t head = atomic_load(&p->ring.head);
            if (head - atomic_load(&p->ring.tail) < SP_RING_SLOTS)
                sp_bell_cancel(&p->space);
            else
                sp_bell_wait(&p->space, seen, HOUR_MS);
        }
        sp_bell_ring(&p->work);
    }
    return NULL;
}

static void *consume(void *arg)
{
    pipe_of_desc *p = arg;
    for (uint64_t i = 0; i < MESSAGES; i++) {
        const sp_desc *d;
        while (!(d = sp_ring_peek(&p->ring))) {
            uint32_t seen = sp_bell_prepare(&p->work);
            if (sp_ring_peek(&p->ring))
                sp_bell_cancel(&p->work);
            else
                sp_bell_wait(&p->work, seen, HOUR_MS);
        }
        CHECK(d->first_page == i && d->pages == i * 3 && d->slot == i * 5);
        sp_ring_pop(&p->ring);
        sp_bell_ring(&p->space);
    }
    return NULL;
}

static void ring_and_bells(void)
{
    pipe_of_desc *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    memset(p, 0, sizeof *p);
    run_together(produce, consume, p);
    CHECK(sp_ring_empty(&p->ring));
    free(p);
}

/* One side sets `requested` and looks at `received`, the other the other way round: for no page may
 * both have looked too early, or a guest would wait for ever.  The payload is published as well. */
enum { PAGES = 1 << 17 };

typedef struct dekker {
    sp_word received[PAGES / 64], requested[PAGES / 64];
    uint8_t fault_saw[PAGES], placement_saw[PAGES];
    uint32_t payload[PAGES];
} dekker;

static void *fault_side(void *arg)
{
    dekker *d = arg;
    for (uint64_t i = 0; i < PAGES; i++) {
        CHECK(sp_bit_claim(d->requested, i));
        d->fault_saw[i] = sp_bit_test(d->received, i);
        if (d->fault_saw[i])
            CHECK_EQ(d->payload[i], i + 1);
    }
    return NULL;
}

static void *placement_side(void *arg)
{
    dekker *d = arg;
    for (uint64_t i = 0; i < PAGES; i++) {
        d->payload[i] = (uint32_t)i + 1;
        sp_bits_set(d->received, i, 1);
        d->placement_saw[i] = sp_bits_any(d->requested, i, 1);
    }
    return NULL;
}

static void claim_and_publish(void)
{
    dekker *d = calloc(1, sizeof *d);
    run_together(fault_side, placement_side, d);
    for (uint64_t i = 0; i < PAGES; i++)
        CHECK(d->fault_saw[i] || d->placement_saw[i]);
    CHECK_EQ(sp_bits_count(d->received, 0, PAGES), PAGES);
    CHECK_EQ(sp_bits_count(d->requested, 0, PAGES), PAGES);
    free(d);
}

/* Two fault loops: every page is requested by exactly one. */
typedef struct race {
    sp_word bits[PAGES / 64];
    _Atomic uint64_t won;
} race;

static void *claim_all(void *arg)
{
    race *r = arg;
    for (uint64_t i = 0; i < PAGES; i++)
        if (sp_bit_claim(r->bits, i))
            atomic_fetch_add(&r->won, 1);
    return NULL;
}

static void one_claim_wins(void)
{
    race *r = calloc(1, sizeof *r);
    run_together(claim_all, claim_all, r);
    CHECK_EQ(r->won, PAGES);
    free(r);
}

/* Two fault loops ask, Python posts, the loop writes, the source reads. */
enum { REQUESTS = 20000, PONGS = 2000 };

typedef struct traffic {
    sp_control *control;
    sp_return_path *rp;
    int wire[2];
    _Atomic uint32_t next_shard;
} traffic;

static void *write_loop(void *arg)
{
    traffic *t = arg;
    CHECK_EQ(sp_rp_loop(t->rp), SP_STOPPED);
    shutdown(t->wire[0], SHUT_WR);
    return NULL;
}

static void *ask(void *arg)
{
    traffic *t = arg;
    uint32_t shard = atomic_fetch_add(&t->next_shard, 1);
    for (uint64_t i = 0; i < REQUESTS; i++) {
        sp_desc d = {i, 1, 0, shard, SP_DESC_REQUEST};
        while (!sp_ring_push(&t->control->shards[shard].requests[shard], &d))
            sched_yield();
        sp_bell_ring(&t->control->requests);
    }
    return NULL;
}

static void *post(void *arg)
{
    traffic *t = arg;
    uint8_t pong[8] = {0, 2, 0, 4};
    for (uint32_t i = 0; i < PONGS; i++) {
        pong[6] = (uint8_t)(i >> 8);
        pong[7] = (uint8_t)i;
        while (sp_rp_post(t->rp, pong, sizeof pong))
            sched_yield();
    }
    return NULL;
}

static uint64_t big_endian(const uint8_t *p, int n)
{
    uint64_t v = 0;
    while (n--)
        v = v << 8 | *p++;
    return v;
}

static void take(int fd, uint8_t *out, size_t n)
{
    for (size_t got = 0; got < n;) {
        ssize_t r = read(fd, out + got, n - got);
        CHECK(r > 0);
        got += (size_t)r;
    }
}

/* Each block's requests in the order they were made, the PONGs in theirs, nothing torn. */
static void *read_all(void *arg)
{
    traffic *t = arg;
    uint64_t next[2] = {0, 0}, pongs = 0;
    uint32_t block = 9;
    uint8_t m[512];
    while (next[0] + next[1] + pongs < 2 * REQUESTS + PONGS) {
        take(t->wire[1], m, 4);
        uint64_t kind = big_endian(m, 2), size = big_endian(m + 2, 2);
        CHECK(size <= sizeof m);
        take(t->wire[1], m, size);
        if (kind == 2) {
            CHECK_EQ(big_endian(m, 4), pongs++);
            continue;
        }
        if (kind == 3)
            block = m[12] == 7; /* pc.bios */
        CHECK(block < 2 && big_endian(m + 8, 4) == SP_PAGE_BYTES);
        CHECK_EQ(big_endian(m, 8), next[block]++ * SP_PAGE_BYTES);
    }
    CHECK(next[0] == REQUESTS && next[1] == REQUESTS && pongs == PONGS);
    return NULL;
}

/* No page of either block. */
static const sp_word NOTHING[5];

static void return_path(void)
{
    traffic t = {.control = new_control(2)};
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, t.wire), 0);
    t.rp = sp_rp_new(t.control, t.wire[0]);
    static const routine ROUTINES[] = {write_loop, read_all, ask, ask, post};
    pthread_t thread[5];
    for (int i = 0; i < 5; i++)
        CHECK_EQ(pthread_create(&thread[i], NULL, ROUTINES[i], &t), 0);
    sp_rp_arm(t.rp, NOTHING, NOTHING);
    for (int i = 1; i < 5; i++)
        CHECK_EQ(pthread_join(thread[i], NULL), 0);
    sp_rp_stop(t.rp);
    CHECK_EQ(pthread_join(thread[0], NULL), 0);
    CHECK_EQ(t.control->totals.requests_sent, 2 * REQUESTS);
    sp_rp_free(t.rp);
    close(t.wire[0]);
    close(t.wire[1]);
    free(t.control);
}

/* As fault.c: straight to the wire, or through the ring while somebody else writes or something waits to
 * be sent.  The wire is TCP with little room: a message that did not fit would be taken in parts, and
 * the wire shut down. */
typedef struct direct {
    traffic t;
    uint8_t asked[2][REQUESTS];
} direct;

static void *ask_directly(void *arg)
{
    direct *d = arg;
    sp_control *c = d->t.control;
    uint32_t shard = atomic_fetch_add(&d->t.next_shard, 1);
    for (uint64_t i = 0; i < REQUESTS; i++) {
        if (sp_rp_request(c, d->t.wire[0], shard, shard, i))
            continue;
        sp_desc one = {i, 1, 0, shard, SP_DESC_REQUEST};
        while (!sp_ring_push(&c->shards[shard].requests[shard], &one))
            sched_yield();
        sp_bell_ring(&c->requests);
    }
    return NULL;
}

/* Every page of both blocks is asked for once, the PONGs come in their order, nothing is torn. */
static void *read_whole(void *arg)
{
    direct *d = arg;
    uint64_t left = 2 * REQUESTS + PONGS, pongs = 0;
    uint32_t block = 9;
    uint8_t m[512];
    for (; left; left--) {
        take(d->t.wire[1], m, 4);
        uint64_t kind = big_endian(m, 2), size = big_endian(m + 2, 2);
        CHECK(kind == 2 ? size == 4 : kind == 4 ? size == 12 : kind == 3 && size >= 13 + 6);
        CHECK(size <= 13 + 7);
        take(d->t.wire[1], m, size);
        if (kind == 2) {
            CHECK_EQ(big_endian(m, 4), pongs++);
            continue;
        }
        if (kind == 3)
            block = memcmp(m + 12, "\x06pc.ram", 7) != 0;
        if (kind == 3 && block)
            CHECK_EQ(memcmp(m + 12, "\x07pc.bios", 8), 0);
        uint64_t page = big_endian(m, 8) / SP_PAGE_BYTES;
        CHECK(block < 2 && page < REQUESTS && big_endian(m + 8, 4) == SP_PAGE_BYTES);
        CHECK_EQ(d->asked[block][page]++, 0);
    }
    return NULL;
}

/* A pair of TCP sockets, the first non-blocking and with as little room as there is. */
static void narrow_pair(int wire[2])
{
    int small = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t len = sizeof at;
    CHECK(listener >= 0 && bind(listener, (struct sockaddr *)&at, len) == 0);
    CHECK_EQ(setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof small), 0);
    CHECK(listen(listener, 1) == 0 && getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    wire[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(setsockopt(wire[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small), 0);
    CHECK_EQ(connect(wire[0], (struct sockaddr *)&at, len), 0);
    wire[1] = accept(listener, NULL, NULL);
    CHECK(wire[1] >= 0 && fcntl(wire[0], F_SETFL, O_NONBLOCK) == 0);
    CHECK_EQ(setsockopt(wire[0], IPPROTO_TCP, TCP_NODELAY, &small, sizeof small), 0);
    close(listener);
}

static void direct_requests(void)
{
    direct *d = calloc(1, sizeof *d);
    d->t.control = new_control(2);
    narrow_pair(d->t.wire);
    d->t.rp = sp_rp_new(d->t.control, d->t.wire[0]);
    static const routine ROUTINES[] = {write_loop, read_whole, ask_directly, ask_directly, post};
    pthread_t thread[5];
    sp_rp_arm(d->t.rp, NOTHING, NOTHING);
    for (int i = 0; i < 5; i++)
        CHECK_EQ(pthread_create(&thread[i], NULL, ROUTINES[i], d), 0);
    for (int i = 1; i < 5; i++)
        CHECK_EQ(pthread_join(thread[i], NULL), 0);
    sp_rp_stop(d->t.rp);
    CHECK_EQ(pthread_join(thread[0], NULL), 0);
    CHECK_EQ(d->t.control->totals.requests_sent, 2 * REQUESTS);
    CHECK_EQ(d->t.control->back_writer, 0);
    sp_rp_free(d->t.rp);
    close(d->t.wire[0]);
    close(d->t.wire[1]);
    free(d->t.control);
    free(d);
}

/* The main channel's loop bets on pages that are not received and writes into them, the preempt
 * channel's loop claims pages, writes and publishes them: no bet ever lands on a published page, and
 * the two never write one page at a time. */
enum { ROUNDS = 2000, BLOCK_PAGES = 200, STAKE = 24 };

typedef struct two_channels {
    sp_ram *main, *preempt;
    uint32_t payload[BLOCK_PAGES];
    pthread_barrier_t round;
} two_channels;

static void *bet_on_pages(void *arg)
{
    two_channels *t = arg;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&t->round);
        for (uint64_t first = 0; first < BLOCK_PAGES; first++) {
            uint64_t most = BLOCK_PAGES - first;
            uint64_t n = sp_straight_announce(t->main, first, most < STAKE ? most : STAKE);
            for (uint64_t i = 0; i < n; i++)
                t->payload[first + i] = 1;
            if (n)
                sp_straight_retract(t->main);
        }
        pthread_barrier_wait(&t->round);
    }
    return NULL;
}

static void *claim_pages(void *arg)
{
    two_channels *t = arg;
    sp_word *received = t->preempt->received;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        sp_bits_clear(received, 0, BLOCK_PAGES);
        pthread_barrier_wait(&t->round);
        for (uint64_t i = 0; i < BLOCK_PAGES; i++) {
            uint64_t page = i * 77 % BLOCK_PAGES;
            CHECK(sp_straight_claim(t->preempt, page));
            t->payload[page] = 2;
            sp_bits_set(received, page, 1);
            sp_straight_unclaim(t->preempt);
        }
        pthread_barrier_wait(&t->round);
        for (uint64_t i = 0; i < BLOCK_PAGES; i++)
            CHECK_EQ(t->payload[i], 2);
    }
    return NULL;
}

static void bets_and_claims(void)
{
    static two_channels t;
    world *w = world_new(1);
    world_go_straight(w);
    t.main = w->ram;
    t.preempt = sp_ram_new(w->stream, w->control, w->received, w->requested, w->pool, w->stop);
    sp_ram_preempt(t.preempt, t.main);
    CHECK_EQ(pthread_barrier_init(&t.round, NULL, 2), 0);
    run_together(bet_on_pages, claim_pages, &t);
    pthread_barrier_destroy(&t.round);
    sp_ram_free(t.preempt);
    world_free(w);
}

int main(void)
{
    bets_and_claims();
    ring_and_bells();
    claim_and_publish();
    one_claim_wins();
    return_path();
    direct_requests();
    return 0;
}
