/* A channel of multifd: its packets into memory, good ones, bad ones, ones that are cut. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "multifd/loop.h"
#include "multifd/packet.h"
#include "stream/sync.h"
#include "suites.h"
#include "world.h"

#ifdef SP_HAVE_ZLIB
#include <zlib.h>
#endif

typedef struct line {
    world *world;
    sp_multifd *loop;
    int wire[2];
    pthread_t thread;
} line;

static void *run(void *arg)
{
    sp_multifd_run(arg);
    return NULL;
}

/* `record_fd`: -1 if what comes is not written down. */
static line open_recorded(world *w, uint32_t number, int record_fd)
{
    line l = {.world = w};
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, l.wire), 0);
    sp_sync_expect(w->control, number);
    l.loop = sp_multifd_new(w->control, number, l.wire[1], w->received, NULL);
    CHECK(l.loop);
    sp_multifd_record(l.loop, record_fd);
    for (uint32_t i = 0; i < WORLD_BLOCKS; i++)
        sp_multifd_use_block(l.loop, i, w->fd[i]);
    CHECK_EQ(pthread_create(&l.thread, NULL, run, l.loop), 0);
    return l;
}

static line open_line(world *w, uint32_t number)
{
    return open_recorded(w, number, -1);
}

static void close_line(line *l, bool stop)
{
    if (stop)
        sp_multifd_stop(l->loop);
    else
        shutdown(l->wire[0], SHUT_WR);
    pthread_join(l->thread, NULL);
    sp_multifd_free(l->loop);
    close(l->wire[0]);
    close(l->wire[1]);
}

static void put32(uint8_t *at, uint32_t value)
{
    value = __builtin_bswap32(value);
    memcpy(at, &value, 4);
}

static void put64(uint8_t *at, uint64_t value)
{
    value = __builtin_bswap64(value);
    memcpy(at, &value, 8);
}

/* n pages from `first` on, then `zeros` more. */
static void fill(uint8_t *raw, uint64_t number, uint32_t flags, uint64_t first, uint32_t n,
                 uint32_t zeros, uint32_t bytes)
{
    memset(raw, 0, SP_PACKET_BYTES);
    put32(raw, 0x11223344);
    put32(raw + 4, 1);
    put32(raw + 8, flags);
    put32(raw + 12, 128);
    put32(raw + 16, n);
    put32(raw + 20, bytes);
    put64(raw + 24, number);
    put32(raw + 32, zeros);
    memcpy(raw + 64, "pc.ram", 6);
    for (uint32_t i = 0; i < n + zeros; i++)
        put64(raw + 320 + 8 * i, (first + i) * SP_PAGE_BYTES);
}

/* The reader may be gone. */
static void give(line *l, const void *bytes, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t w = send(l->wire[0], (const char *)bytes + done, n - done, MSG_NOSIGNAL);
        if (w <= 0)
            return;
        done += (size_t)w;
    }
}

static void give_pages(line *l, uint64_t number, uint64_t first, uint32_t n, uint32_t zeros)
{
    uint8_t raw[SP_PACKET_BYTES];
    fill(raw, number, 0, first, n, zeros, n * SP_PAGE_BYTES);
    give(l, raw, sizeof raw);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t page[SP_PAGE_BYTES];
        memset(page, (int)(first + i) + 1, sizeof page);
        give(l, page, sizeof page);
    }
}

static void give_sync(line *l, uint64_t number)
{
    uint8_t raw[SP_PACKET_BYTES];
    fill(raw, number, SP_PACKET_SYNC, 0, 0, 0, 0);
    give(l, raw, sizeof raw);
}

static uint8_t byte_of(const world *w, uint64_t page)
{
    uint8_t byte = 0;
    CHECK_EQ(pread(w->fd[0], &byte, 1, (off_t)(page * SP_PAGE_BYTES + 77)), 1);
    return byte;
}

static void test_pages_and_zeros(void)
{
    world *w = world_new(0);
    line l = open_line(w, 0);
    give_pages(&l, 0, 10, 40, 0);
    give_pages(&l, 1, 12, 0, 3);
    close_line(&l, false);
    sp_multifd_channel *ch = &w->control->channels[0];
    CHECK_EQ(ch->status, SP_EOF);
    CHECK_EQ(atomic_load(&ch->packets), 2);
    CHECK_EQ(sp_bits_count(w->received, world_bit(w, 0, 0), WORLD_PAGES[0]), 40);
    for (uint64_t page = 10; page < 50; page++)
        CHECK_EQ(byte_of(w, page), page >= 12 && page < 15 ? 0 : page + 1);
    world_free(w);
}

static void test_recorded(void)
{
    world *w = world_new(0);
    int file[2];
    CHECK_EQ(pipe(file), 0);
    line l = open_recorded(w, 0, file[1]);
    give_pages(&l, 0, 10, 3, 0);
    give_sync(&l, 1);
    sp_sync_release(w->control, 1);
    close_line(&l, false);
    uint8_t raw[SP_PACKET_BYTES], page[SP_PAGE_BYTES], got[SP_PACKET_BYTES];
    fill(raw, 0, 0, 10, 3, 0, sizeof page * 3);
    CHECK_EQ(read(file[0], got, sizeof got), sizeof got);
    CHECK_EQ(memcmp(got, raw, sizeof raw), 0);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(read(file[0], page, sizeof page), sizeof page);
        CHECK_EQ(page[0], 11 + i);
    }
    fill(raw, 1, SP_PACKET_SYNC, 0, 0, 0, 0);
    CHECK_EQ(read(file[0], got, sizeof got), sizeof got);
    CHECK_EQ(memcmp(got, raw, sizeof raw), 0);
    close(file[0]);
    close(file[1]);
    world_free(w);
}

static void test_a_recording_that_cannot_be_written(void)
{
    world *w = world_new(0);
    line l = open_recorded(w, 0, 1000000); /* no such descriptor */
    give_pages(&l, 0, 10, 3, 0);
    pthread_join(l.thread, NULL);
    CHECK_EQ(w->control->channels[0].status, SP_SYS);
    CHECK_EQ(w->control->channels[0].err, EBADF);
    CHECK_EQ(sp_bits_count(w->received, world_bit(w, 0, 0), WORLD_PAGES[0]), 0);
    sp_multifd_free(l.loop);
    close(l.wire[0]);
    close(l.wire[1]);
    world_free(w);
}

static void test_meetings(void)
{
    world *w = world_new(0);
    line lines[2] = {open_line(w, 0), open_line(w, 1)};
    for (uint64_t round = 0; round < 20; round++) {
        for (uint32_t i = 0; i < 2; i++) {
            give_pages(&lines[i], 4 * round + i, round * 8 + i * 4, 4, 0);
            give_sync(&lines[i], 4 * round + 2 + i);
        }
        sp_sync_view view;
        CHECK_EQ(sp_sync_await(w->control, 2, round + 1, w->stop, &view), SP_OK);
        CHECK_EQ(view.packets, 4 * (round + 1));
        CHECK_EQ(view.numbers, view.packets);
        CHECK_EQ(sp_bits_count(w->received, world_bit(w, 0, 0), WORLD_PAGES[0]), 8 * (round + 1));
        sp_sync_release(w->control, round + 1);
    }
    CHECK_EQ(sp_sync_settle(w->control, 2), -1);
    for (uint32_t i = 0; i < 2; i++)
        close_line(&lines[i], false);
    sp_sync_view view;
    CHECK_EQ(sp_sync_await(w->control, 2, 21, w->stop, &view), SP_CHANNEL_LOST);
    world_free(w);
}

static void test_stop_in_the_middle(void)
{
    for (int what = 0; what < 3; what++) {
        world *w = world_new(0);
        line l = open_line(w, 0);
        if (what == 1)
            give_sync(&l, 0);
        if (what == 2)
            give(&l, "\x11\x22", 2);
        close_line(&l, true);
        CHECK_EQ(atomic_load(&w->control->channels[0].state), SP_MULTIFD_ENDED);
        world_free(w);
    }
}

/* Whatever stands in a packet: it ends, and writes nowhere else. */
static void test_damaged_packets(void)
{
    uint64_t seed = 4711;
    world *w = world_new(0);
    sp_sync_release(w->control, UINT64_MAX / 2);
    for (int i = 0; i < 400; i++) {
        uint8_t raw[SP_PACKET_BYTES];
        uint32_t n = (uint32_t)random_below(&seed, 5), zeros = (uint32_t)random_below(&seed, 5);
        fill(raw, (uint64_t)i, (uint32_t)random_below(&seed, 2) * 2, random_below(&seed, 190), n, zeros,
             n * SP_PAGE_BYTES);
        for (uint64_t hits = random_below(&seed, 4); hits; hits--)
            raw[random_below(&seed, hits % 2 ? 340 : sizeof raw)] = (uint8_t)next_random(&seed);
        line l = open_line(w, 0);
        give(&l, raw, sizeof raw);
        give(&l, raw, random_below(&seed, sizeof raw));
        close_line(&l, i % 2);
    }
    world_free(w);
}

#ifdef SP_HAVE_ZLIB
static void test_zlib(void)
{
    world *w = world_new(0);
    line l = open_line(w, 0);
    z_stream z = {0};
    CHECK_EQ(deflateInit(&z, 1), Z_OK);
    for (uint64_t number = 0; number < 5; number++) {
        uint8_t raw[SP_PACKET_BYTES], pages[8 * SP_PAGE_BYTES], packed[sizeof pages * 2];
        for (size_t i = 0; i < sizeof pages; i++)
            pages[i] = (uint8_t)(number * 8 + i / SP_PAGE_BYTES + 1);
        z.next_in = pages;
        z.avail_in = sizeof pages;
        z.next_out = packed;
        z.avail_out = sizeof packed;
        CHECK_EQ(deflate(&z, Z_SYNC_FLUSH), Z_OK);
        uint32_t bytes = (uint32_t)(sizeof packed - z.avail_out);
        fill(raw, number, SP_PACKET_ZLIB, number * 8, 8, 0, bytes);
        give(&l, raw, sizeof raw);
        give(&l, packed, bytes);
    }
    deflateEnd(&z);
    close_line(&l, false);
    CHECK_EQ(w->control->channels[0].status, SP_EOF);
    for (uint64_t page = 0; page < 40; page++)
        CHECK_EQ(byte_of(w, page), page + 1);
    world_free(w);
}
#endif

void multifd_suite(void)
{
    test_pages_and_zeros();
    test_recorded();
    test_a_recording_that_cannot_be_written();
    test_meetings();
    test_stop_in_the_middle();
    test_damaged_packets();
#ifdef SP_HAVE_ZLIB
    test_zlib();
#endif
}
