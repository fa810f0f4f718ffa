/* Packets of multifd: the loop of one channel, on segments of a world, with both placements.
 *
 * A packet is long and mostly offsets, so an input is a little program that builds packets, spoils them
 * and says what follows; its words are in the table at the end.  Byte 0 chooses the placement.  All of
 * it stands in the socket before the loop begins, so that nothing is left to threads.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "fuzz.h"
#include "multifd/loop.h"
#include "multifd/packet.h"
#include "multifd/unpack.h"
#include "reader.h"
#include "stream/sync.h"

#ifdef SP_HAVE_ZLIB
#include <zlib.h>
#endif

enum { MOST_SENT = 96 * 1024, ARG_BITS = 3 }; /* less than a socket holds */
static const char *const NAMES[WORLD_BLOCKS] = {"pc.ram", "pc.bios"};

typedef struct program {
    const uint8_t *at, *end;
    int wire[2];
    size_t sent;
    uint64_t number;
    uint8_t fill, packet[SP_PACKET_BYTES];
    int has_packet;
#ifdef SP_HAVE_ZLIB
    z_stream zlib;
#endif
} program;

static uint8_t next(program *p)
{
    return p->at < p->end ? *p->at++ : 0;
}

static void put(program *p, const void *bytes, size_t n)
{
    n = n < MOST_SENT - p->sent ? n : MOST_SENT - p->sent;
    p->sent += n;
    CHECK_EQ(send(p->wire[0], bytes, n, MSG_DONTWAIT), (ssize_t)n);
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

/* The packet that was built goes out when the next one is built, or something else is said. */
static void flush(program *p)
{
    if (p->has_packet)
        put(p, p->packet, sizeof p->packet);
    p->has_packet = 0;
}

static void build(program *p, uint32_t flags, uint32_t normal, uint32_t zero, uint32_t bytes)
{
    flush(p);
    uint64_t page = next(p);
    memset(p->packet, 0, sizeof p->packet);
    put32(p->packet, 0x11223344);
    put32(p->packet + 4, 1);
    put32(p->packet + 8, flags);
    put32(p->packet + 12, SP_PACKET_MOST_PAGES);
    put32(p->packet + 16, normal);
    put32(p->packet + 20, bytes);
    put64(p->packet + 24, p->number++);
    put32(p->packet + 32, zero);
    strcpy((char *)p->packet + 64, NAMES[flags == 0 && page < 2]);
    for (uint32_t i = 0; i < normal + zero; i++)
        put64(p->packet + 320 + 8 * i, (page + i) * SP_PAGE_BYTES);
    p->has_packet = 1;
}

static void raw(program *p, unsigned arg)
{
    size_t n = arg + 1u, left = (size_t)(p->end - p->at);
    flush(p);
    n = n < left ? n : left;
    put(p, p->at, n);
    p->at += n;
}

static void plain(program *p, unsigned arg)
{
    build(p, 0, arg & 7, arg >> 3, (arg & 7) * SP_PAGE_BYTES);
}

static void meet(program *p, unsigned arg)
{
    build(p, SP_PACKET_SYNC, 0, 0, arg);
}

static void payload(program *p, unsigned arg)
{
    uint8_t page[SP_PAGE_BYTES];
    flush(p);
    for (unsigned i = 0; i <= arg % 8; i++) {
        memset(page, ++p->fill, sizeof page);
        put(p, page, arg < 16 ? sizeof page : sizeof page / 2);
    }
}

/* A byte of the packet that has not gone out yet, where a number stands for small arguments. */
static void spoil(program *p, unsigned arg)
{
    size_t at = arg < 16 ? 8 + arg * 4 % 28 : (size_t)next(p) << 8 | next(p);
    p->packet[(at + (arg & 3)) % sizeof p->packet] = next(p);
}

static void method(program *p, unsigned arg)
{
    build(p, arg & 1 ? SP_PACKET_ZSTD : SP_PACKET_ZLIB, 1 + (arg >> 1 & 3), arg >> 3, 1 + next(p));
}

/* What a source's channel sends, one stream from its first packet on. */
static void packed(program *p, unsigned arg)
{
#ifdef SP_HAVE_ZLIB
    uint8_t pages[4 * SP_PAGE_BYTES], out[sizeof pages];
    uint32_t n = 1 + (arg & 3);
    memset(pages, ++p->fill, sizeof pages);
    p->zlib.next_in = pages;
    p->zlib.avail_in = n * SP_PAGE_BYTES;
    p->zlib.next_out = out;
    p->zlib.avail_out = sizeof out;
    CHECK_EQ(deflate(&p->zlib, arg & 16 ? Z_FINISH : Z_SYNC_FLUSH), arg & 16 ? Z_STREAM_END : Z_OK);
    uint32_t bytes = (uint32_t)(sizeof out - p->zlib.avail_out);
    build(p, SP_PACKET_ZLIB, n, arg >> 2 & 3, bytes);
    flush(p);
    put(p, out, bytes);
    if (arg & 16)
        deflateReset(&p->zlib);
#else
    method(p, arg);
#endif
}

static void nothing(program *p, unsigned arg)
{
    (void)arg;
    flush(p);
}

/* A word is a byte: its kind in the low bits, its argument in the others. */
static void (*const WORDS[1 << ARG_BITS])(program *p, unsigned arg) = {
    raw, plain, meet, payload, spoil, method, packed, nothing,
};

static void write_channel(program *p)
{
    while (p->at < p->end && p->sent < MOST_SENT) {
        unsigned word = *p->at++;
        WORDS[word % (1 << ARG_BITS)](p, word >> ARG_BITS);
    }
    flush(p);
    shutdown(p->wire[0], SHUT_WR);
}

/* With `copy` what has not arrived is a hole. */
static void check_pages(const world *w)
{
    static const uint8_t zeros[SP_PAGE_BYTES];
    uint8_t page[SP_PAGE_BYTES];
    for (uint32_t b = 0; !w->written && b < WORLD_BLOCKS; b++)
        for (uint64_t n = 0; n < WORLD_PAGES[b]; n++)
            if (!sp_bit_test(w->received, world_bit(w, b, n))) {
                CHECK_EQ(pread(w->fd[b], page, sizeof page, (off_t)(n * sizeof page)), sizeof page);
                CHECK_EQ(memcmp(page, zeros, sizeof page), 0);
            }
}

static void receive(program *p, world *w)
{
    sp_multifd *loop = sp_multifd_new(w->control, 0, p->wire[1], w->received, w->written);
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        sp_multifd_use_block(loop, b, w->fd[b]);
    sp_sync_expect(w->control, 0);
    sp_sync_release(w->control, UINT64_MAX / 2); /* no meeting holds it up */
    sp_multifd_run(loop);
    sp_multifd_free(loop);
    sp_multifd_channel *ch = &w->control->channels[0];
    CHECK_EQ(atomic_load(&ch->state), SP_MULTIFD_ENDED);
    CHECK_EQ(atomic_load(&ch->landing), 0);
    CHECK(ch->status == SP_EOF || ch->status == SP_CHANNEL_CUT ||
          (ch->status >= SP_PACKET_MAGIC && ch->status < SP_PACKET_LATE));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    world *w = reader_new(0, size ? data[0] & 1 : 0);
    program *p = calloc(1, sizeof *p);
    p->at = data + (size > 0);
    p->end = data + size;
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, p->wire), 0);
#ifdef SP_HAVE_ZLIB
    CHECK_EQ(deflateInit(&p->zlib, 1), Z_OK);
#endif
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        CHECK_EQ(fallocate(w->fd[b], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                           (off_t)(WORLD_PAGES[b] * SP_PAGE_BYTES)), 0);
    write_channel(p);
    receive(p, w);
    reader_check(w);
    check_pages(w);
#ifdef SP_HAVE_ZLIB
    deflateEnd(&p->zlib);
#endif
    close(p->wire[0]);
    close(p->wire[1]);
    free(p);
    return 0;
}
