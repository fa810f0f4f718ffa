/* The return path: what it writes, and when it ends. */
#define _GNU_SOURCE
#include "back/bitmaps.h"
#include "back/return_path.h"
#include "shard/request.h"

#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
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

/* Bitmaps of both blocks, in which nothing is set. */
static sp_word received[5], requested[5];

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
    sp_rp_arm(rp, received, requested);
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

/* What is requested and not received is asked for again, in runs, however often that is said. */
static const uint8_t OUTSTANDING[] = {
    0, 3, 0, 19, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x20, 0, 6, 'p', 'c', '.', 'r', 'a', 'm',
    0, 4, 0, 12, 0, 0, 0, 0, 0, 0xc, 0x70, 0, 0, 0, 0x10, 0,
    0, 3, 0, 20, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 7, 'p', 'c', '.', 'b', 'i', 'o', 's',
};

static void check_again(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    sp_word here[5] = {0}, wanted[5] = {0};
    int wire[2];
    uint8_t got[256];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    sp_bits_set(wanted, 3, 3);
    sp_bits_set(here, 3, 1);
    sp_bits_set(wanted, 199, 1); /* the last page of its block */
    sp_bits_set(wanted, c->blocks[1].first_bit + 2, 1);
    sp_bits_set(here, 60, 70);
    atomic_store(&c->back_lost, 1);
    sp_rp_stop(rp);
    sp_rp_again(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED); /* not armed */
    sp_rp_arm(rp, here, wanted);
    CHECK_EQ(c->back_lost, 0);
    for (int turn = 0; turn < 2; turn++, sp_rp_again(rp)) {
        CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
        CHECK_EQ(read(wire[1], got, sizeof got), sizeof OUTSTANDING);
        CHECK(memcmp(got, OUTSTANDING, sizeof OUTSTANDING) == 0);
    }
    CHECK_EQ(c->totals.requests_sent, 6);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* A source with huge pages is asked for whole ones, each once. */
static const uint8_t HUGE_ONES[] = {
    0, 3, 0, 16, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x20, 0, 0, 3, 'r', 'a', 'm',
    0, 4, 0, 12, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 0x40, 0, 0,
    0, 3, 0, 14, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x40, 0, 0, 0, 1, 'g',
    0, 4, 0, 12, 0, 0, 0, 0, 0x80, 0, 0, 0, 0x40, 0, 0, 0,
};

static void check_huge(void)
{
    enum { HUGE = 512, GIGANTIC = 262144, RAM = 5 * HUGE, PAGES = RAM + 3 * GIGANTIC };
    static sp_word here[PAGES / 64], wanted[PAGES / 64];
    sp_control *c = calloc(1, sp_control_bytes(1));
    int wire[2];
    uint8_t got[256];
    sp_control_init(c, 1, 1);
    CHECK_EQ(sp_control_add_block(c, 0, "ram", (uint64_t)RAM * SP_PAGE_BYTES), 0);
    CHECK_EQ(sp_control_add_block(c, 1, "g", 3ULL * GIGANTIC * SP_PAGE_BYTES), 1);
    CHECK_EQ(sp_control_set_source_page(c, 0, 3 << 20), -EINVAL);
    CHECK_EQ(sp_control_set_source_page(c, 0, 4 << 20), -EINVAL); /* not whole ones */
    CHECK_EQ(sp_control_set_source_page(c, 0, 2 << 20), 0);
    CHECK_EQ(sp_control_set_source_page(c, 1, 1 << 30), 0);
    CHECK_EQ(sp_control_publish(c, 2, 512), 0);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_bits_set(wanted, HUGE + 3, 1);
    sp_bits_set(wanted, HUGE + 300, 1);
    sp_bits_set(wanted, 2 * HUGE - 1, 1);
    sp_bits_set(wanted, 4 * HUGE - 2, 4); /* over an edge */
    sp_bits_set(here, 0, HUGE + 100);
    uint64_t g = c->blocks[1].first_bit;
    sp_bits_set(wanted, g + 2 * GIGANTIC - 1, 2); /* each is the most that one may ask for */
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    sp_rp_arm(rp, here, wanted);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(read(wire[1], got, sizeof got), sizeof HUGE_ONES);
    CHECK(memcmp(got, HUGE_ONES, sizeof HUGE_ONES) == 0);
    CHECK(sp_rp_request(c, wire[0], 0, 0, HUGE + 300)); /* a fault loop's own */
    CHECK_EQ(read(wire[1], got, sizeof got), 20);
    CHECK(memcmp(got, HUGE_ONES, 20) == 0);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* One that never ends would ask for nothing new and never stop. */
static void check_more_than_fits(void)
{
    enum { PAGES = 100000, WORDS = (PAGES + 63) / 64 };
    static sp_word here[WORDS], wanted[WORDS];
    sp_control *c = calloc(1, sp_control_bytes(1));
    sp_control_init(c, 1, 1);
    CHECK_EQ(sp_control_add_block(c, 0, "ram", (uint64_t)PAGES * SP_PAGE_BYTES), 0);
    CHECK_EQ(sp_control_publish(c, 1, 64), 0);
    for (uint64_t page = 0; page < PAGES; page += 2)
        sp_bits_set(wanted, page, 1);
    sp_return_path *rp = sp_rp_new(c, -1);
    sp_rp_arm(rp, here, wanted);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(c->totals.requests_sent, PAGES / 2);
    sp_rp_free(rp);
    free(c);
}

/* As QEMU writes them: whole words, little-endian whatever the host is. */
static void check_bitmaps(void)
{
    static const uint8_t ram[] = {0, 5, 0, 7, 6, 'p', 'c', '.', 'r', 'a', 'm', 0, 0, 0, 0, 0, 0, 0, 32,
                                  0x12};
    static const uint8_t bios[] = {0, 5, 0, 8, 7, 'p', 'c', '.', 'b', 'i', 'o', 's',
                                   0, 0, 0, 0, 0, 0, 0, 8, 5, 0, 0, 0, 0, 0, 0, 0};
    static const uint8_t end[] = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
    sp_control *c = new_control(WORLD_SHARDS);
    sp_word here[5] = {0};
    int wire[2];
    uint8_t got[256];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_return_path *rp = sp_rp_new(c, wire[0]);
    sp_bits_set(here, 1, 1);
    sp_bits_set(here, 4, 1);
    sp_bits_set(here, 199, 1);
    sp_bits_set(here, c->blocks[1].first_bit, 1);
    sp_bits_set(here, c->blocks[1].first_bit + 2, 1);
    CHECK_EQ(sp_rp_post(rp, WANTED, 8), 0);
    CHECK_EQ(sp_rp_bitmap(rp, here, 0), 0);
    CHECK_EQ(sp_rp_bitmap(rp, here, 1), 0);
    sp_rp_stop(rp);
    CHECK_EQ(sp_rp_loop(rp), SP_STOPPED);
    CHECK_EQ(read(wire[1], got, sizeof got), 8 + 19 + 32 + 8 + 20 + 8 + 8);
    CHECK(memcmp(got, WANTED, 8) == 0);
    CHECK(memcmp(got + 8, ram, sizeof ram) == 0);
    CHECK_EQ(got[8 + 19 + 24], 0x80); /* bit 199 */
    CHECK(memcmp(got + 8 + 19 + 32, end, sizeof end) == 0);
    CHECK(memcmp(got + 8 + 19 + 32 + 8, bios, sizeof bios) == 0);
    CHECK(memcmp(got + 8 + 19 + 32 + 8 + sizeof bios, end, sizeof end) == 0);
    sp_rp_free(rp);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* A fault loop's request goes whole or not at all, and a dead loop's turn is taken back. */
static void check_own_requests(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2];
    uint8_t junk[4096] = {0}, got[64];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    CHECK(sp_rp_request(c, wire[0], 1, 0, 3));
    CHECK_EQ(read(wire[1], got, sizeof got), 23);
    CHECK(memcmp(got, WANTED + 8, 23) == 0);
    CHECK_EQ(c->back_writer, 0);
    atomic_store(&c->back_writer, 2);
    CHECK(!sp_rp_request(c, wire[0], 0, 0, 3));
    sp_rp_take_back(c, 0); /* it is shard 1's */
    CHECK(!sp_rp_request(c, wire[0], 0, 0, 3));
    sp_rp_take_back(c, 1);
    CHECK(sp_rp_request(c, wire[0], 0, 0, 3));
    while (write(wire[0], junk, sizeof junk) > 0) {
    }
    CHECK(!sp_rp_request(c, wire[0], 0, 0, 3));
    CHECK_EQ(c->back_writer, 0);
    CHECK_EQ(c->totals.requests_sent, 2);
    close(wire[0]);
    close(wire[1]);
    free(c);
}

/* A TCP wire on which bytes wait: a further message might be cut, so it is not begun. */
static int tcp_pair(int wire[2])
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(bind(listening, (struct sockaddr *)&at, len), 0);
    CHECK_EQ(listen(listening, 1), 0);
    CHECK_EQ(getsockname(listening, (struct sockaddr *)&at, &len), 0);
    wire[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(connect(wire[0], (struct sockaddr *)&at, len), 0);
    wire[1] = accept(listening, NULL, NULL);
    close(listening);
    return wire[1] < 0 ? -1 : 0;
}

static void check_busy_tcp(void)
{
    sp_control *c = new_control(WORLD_SHARDS);
    int wire[2], small = 4096;
    static uint8_t junk[1 << 20];
    CHECK_EQ(tcp_pair(wire), 0);
    CHECK_EQ(setsockopt(wire[1], SOL_SOCKET, SO_RCVBUF, &small, sizeof small), 0);
    CHECK(sp_rp_request(c, wire[0], 0, 0, 3));
    while (send(wire[0], junk, sizeof junk, MSG_DONTWAIT) > 0) {
    }
    CHECK_EQ(recv(wire[1], junk, 1000, MSG_WAITALL), 1000);
    CHECK(!sp_rp_request(c, wire[0], 0, 0, 3));
    CHECK_EQ(c->back_writer, 0);
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
    sp_rp_arm(rp, received, requested);
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
    check_again();
    check_huge();
    check_more_than_fits();
    check_bitmaps();
    check_own_requests();
    check_busy_tcp();
}
