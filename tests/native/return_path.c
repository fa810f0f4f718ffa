/* The return path: what it writes, and when it ends. */
#define _GNU_SOURCE
#include "return_path.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "suites.h"
#include "world.h"

static void ask(sp_control *c, uint32_t shard, uint32_t guest, uint32_t block, uint64_t page)
{
    sp_desc d = {page, 1, 0, block, SP_DESC_REQUEST};
    CHECK(sp_ring_push(&c->shards[shard].requests[guest], &d));
}

static const uint8_t WANTED[] = {
    0, 2, 0, 4, 0, 0, 0, 1, /* PONG 1, posted */
    0, 3, 0, 19, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 6, 'p', 'c', '.', 'r', 'a', 'm',
    0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0x10, 0,
    0, 3, 0, 20, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 7, 'p', 'c', '.', 'b', 'i', 'o', 's',
    0, 3, 0, 19, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0x10, 0, 6, 'p', 'c', '.', 'r', 'a', 'm',
};

/* Told to stop before it starts: it sends everything there is, then ends. */
static void check_bytes(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2];
    uint8_t got[256];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    ask(c, 0, 0, 0, 3);
    ask(c, 0, 0, 0, 5);
    ask(c, 0, 7, 1, 2);
    ask(c, 1, 0, 0, 64);
    CHECK_EQ(sp_rp_post(rp, WANTED, 8), 0);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED); /* not armed: posted messages only */
    CHECK_EQ(read(wire[1], got, sizeof got), 8);
    CHECK(memcmp(got, WANTED, 8) == 0);
    sp_rp_arm(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(read(wire[1], got, sizeof got), sizeof WANTED - 8);
    CHECK(memcmp(got, WANTED + 8, sizeof WANTED - 8) == 0);
    CHECK_EQ(rp->sent, sizeof WANTED);
    CHECK_EQ(c->totals.requests_sent, 4);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* More requests than the buffer holds, and an outbox that is full. */
static void check_bounds(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    sp_return_path *rp = sp_rp_new(c, -1);
    uint8_t message[100] = {0};
    uint32_t asked = 0;
    for (uint32_t shard = 0; shard < WORLD_SHARDS; shard++)
        for (uint32_t guest = 0; guest < SP_MAX_GUESTS; guest++)
            for (uint32_t n = 0; n < SP_RING_SLOTS; n++, asked++)
                ask(c, shard, guest, n % 2, n % 3);
    size_t posted = 0;
    while (sp_rp_post(rp, message, sizeof message) == 0)
        posted += sizeof message;
    CHECK_EQ(posted, SP_RP_OUTBOX / sizeof message * sizeof message);
    CHECK_EQ(sp_rp_post(rp, message, sizeof message), -ENOBUFS);
    sp_rp_arm(rp);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(c->totals.requests_sent, asked);
    CHECK_EQ(sp_rp_post(rp, message, sizeof message), 0);
    sp_rp_free(rp);
    free(c);
}

static void check_dead_wire(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2];
    uint8_t pong[8] = {0, 2, 0, 4};
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    close(wire[1]);
    CHECK_EQ(sp_rp_post(rp, pong, sizeof pong), 0);
    CHECK_EQ(sp_rp_loop(rp), SP_SYS);
    CHECK_EQ(rp->err, EPIPE);
    sp_rp_free(rp);
    close(wire[0]);
    free(c);
}

/* A peer that reads nothing does not keep a stopped receiver for ever. */
static void check_stuck_wire(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2];
    uint8_t junk[4096] = {0};
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    while (write(wire[0], junk, sizeof junk) > 0) {
    }
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    CHECK_EQ(sp_rp_post(rp, junk, 8), 0);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(rp->sent, 0);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* A fault loop is writing as the receiver is told to stop: what was posted goes out after it. */
static void *run_loop(void *arg)
{
    CHECK_EQ(sp_rp_loop(arg), SP_STOPPED);
    return NULL;
}

static void check_stop_in_turn(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2];
    uint8_t shut[8] = {0, 1, 0, 4}, got[64];
    pthread_t thread;
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    atomic_store(&c->back_writer, 1);
    CHECK_EQ(sp_rp_post(rp, shut, sizeof shut), 0);
    sp_rp_stop(rp);
    CHECK_EQ(pthread_create(&thread, NULL, run_loop, rp), 0);
    while (atomic_load(&rp->posted)) /* it has taken the message, and waits for its turn */
        sched_yield();
    atomic_store(&c->back_writer, 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(read(wire[1], got, sizeof got), sizeof shut);
    CHECK_EQ(c->back_writer, 0);

    atomic_store(&rp->stop, 0); /* a writer that died keeps nobody for ever */
    atomic_store(&c->back_writer, 1);
    CHECK_EQ(sp_rp_post(rp, shut, sizeof shut), 0);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK(read(wire[1], got, sizeof got) < 0 && errno == EAGAIN);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

void return_path_suite(void)
{
    check_bytes();
    check_bounds();
    check_dead_wire();
    check_stuck_wire();
    check_stop_in_turn();
}
