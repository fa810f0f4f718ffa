/* The buffered reader of a descriptor. */
#define _GNU_SOURCE
#include "stream/stream.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "suites.h"

static sp_stream *connected(int wire[2], int stop_fd, int record_fd)
{
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    sp_stream *s = sp_stream_new(wire[1], stop_fd, record_fd);
    CHECK(s);
    return s;
}

static void disconnect(sp_stream *s, int wire[2])
{
    sp_stream_free(s);
    close(wire[0]);
    close(wire[1]);
}

static void check_pieces(void)
{
    int wire[2];
    sp_stream *s = connected(wire, -1, -1);
    uint8_t *out = malloc(10);
    size_t got = 0;
    CHECK_EQ(sp_stream_read(s, out, 10, &got, 0), SP_AGAIN);
    CHECK_EQ(write(wire[0], "0123", 4), 4);
    CHECK_EQ(sp_stream_read(s, out, 10, &got, 0), SP_AGAIN);
    CHECK_EQ(got, 4);
    CHECK_EQ(write(wire[0], "456789abcdef", 12), 12);
    CHECK_EQ(sp_stream_read(s, out, 10, &got, 0), SP_OK);
    CHECK(memcmp(out, "0123456789", 10) == 0);
    CHECK_EQ(sp_stream_offset(s), 10);
    CHECK_EQ(sp_stream_some(s, out, 4, &got, 0), SP_OK);
    CHECK(got == 4 && memcmp(out, "abcd", 4) == 0);
    CHECK_EQ(sp_stream_some(s, out, 10, &got, 0), SP_OK);
    CHECK(got == 2 && memcmp(out, "ef", 2) == 0);
    CHECK_EQ(sp_stream_some(s, out, 10, &got, 0), SP_AGAIN);
    shutdown(wire[0], SHUT_WR);
    CHECK_EQ(sp_stream_some(s, out, 10, &got, 0), SP_EOF);
    CHECK_EQ(sp_stream_offset(s), 16);
    free(out);
    disconnect(s, wire);
}

/* Wishes that reach the end of the buffer move what is unread to its front. */
static void check_wrapping(void)
{
    int wire[2];
    sp_stream *s = connected(wire, -1, -1);
    uint64_t seed = 3, sent = 0, seen = 0;
    static uint8_t piece[60000];
    while (seen < 4 * SP_STREAM_BUFFER) {
        size_t n = 1 + random_below(&seed, sizeof piece);
        for (size_t i = 0; i < n; i++)
            piece[i] = (uint8_t)((sent + i) * 2654435761u >> 13);
        ssize_t w = write(wire[0], piece, n);
        CHECK(w > 0);
        sent += (uint64_t)w;
        size_t want = random_below(&seed, sent - seen) + 1;
        want = want < SP_STREAM_BUFFER ? want : SP_STREAM_BUFFER;
        CHECK_EQ(sp_stream_need(s, want, 1 + random_below(&seed, 65536), 0), SP_OK);
        CHECK(sp_stream_unread(s) >= want);
        size_t take = random_below(&seed, want + 1);
        for (size_t i = 0; i < take; i++)
            CHECK_EQ(s->buf[s->pos + i], (uint8_t)((seen + i) * 2654435761u >> 13));
        s->pos += take;
        seen += take;
        CHECK_EQ(sp_stream_offset(s), seen);
    }
    disconnect(s, wire);
}

static void check_stop(void)
{
    int wire[2], stop = eventfd(0, EFD_CLOEXEC);
    sp_stream *s = connected(wire, stop, -1);
    uint8_t byte;
    size_t got = 0;
    CHECK_EQ(eventfd_write(stop, 1), 0);
    CHECK_EQ(sp_stream_read(s, &byte, 1, &got, -1), SP_STOPPED);
    CHECK_EQ(write(wire[0], "x", 1), 1); /* what is there is still read */
    CHECK_EQ(sp_stream_read(s, &byte, 1, &got, -1), SP_OK);
    disconnect(s, wire);
    close(stop);
}

static void check_recording(void)
{
    int wire[2], file = memfd_create("recording", MFD_CLOEXEC);
    sp_stream *s = connected(wire, -1, file);
    uint8_t a[3], b[100], back[64];
    struct iovec iov[2] = {{a, sizeof a}, {b, sizeof b}};
    size_t got = 0;
    CHECK_EQ(write(wire[0], "0123456789", 10), 10);
    CHECK_EQ(sp_stream_scatter(s, iov, 2, &got, 0), SP_OK);
    CHECK(got == 10 && memcmp(a, "012", 3) == 0 && memcmp(b, "3456789", 7) == 0);
    CHECK_EQ(write(wire[0], "abc", 3), 3);
    CHECK_EQ(sp_stream_need(s, 1, 1, 0), SP_OK);
    CHECK_EQ(sp_stream_unread(s), 1);
    CHECK_EQ(sp_stream_need(s, 3, 100, 0), SP_OK);
    CHECK_EQ(pread(file, back, sizeof back, 0), 13);
    CHECK(memcmp(back, "0123456789abc", 13) == 0);
    s->record_fd = wire[0] + 1000; /* no such descriptor */
    CHECK_EQ(write(wire[0], "d", 1), 1);
    CHECK_EQ(sp_stream_need(s, 4, 100, 0), SP_SYS);
    CHECK_EQ(s->err, EBADF);
    disconnect(s, wire);
    close(file);
}

static void check_broken_wire(void)
{
    sp_stream *s = sp_stream_new(9999, -1, -1);
    size_t got = 0;
    uint8_t byte;
    CHECK_EQ(sp_stream_read(s, &byte, 1, &got, -1), SP_SYS);
    CHECK_EQ(s->err, EBADF);
    sp_stream_free(s);
}

void stream_suite(void)
{
    check_pieces();
    check_wrapping();
    check_stop();
    check_recording();
    check_broken_wire();
}
