#define _GNU_SOURCE
#include "stream/stream.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/write.h"

sp_stream *sp_stream_new(int fd, int stop_fd, int record_fd)
{
    sp_stream *s = malloc(sizeof *s);
    if (!s)
        return NULL;
    memset(s, 0, offsetof(sp_stream, buf));
    s->fd = fd;
    s->stop_fd = stop_fd;
    s->record_fd = record_fd;
    return s;
}

void sp_stream_free(sp_stream *s)
{
    free(s);
}

uint64_t sp_stream_offset(const sp_stream *s)
{
    return s->total - sp_stream_unread(s);
}

static sp_status failed(sp_stream *s, int err)
{
    s->err = err;
    return SP_SYS;
}

static sp_status wait_readable(sp_stream *s, int timeout_ms)
{
    struct pollfd p[2] = {{.fd = s->fd, .events = POLLIN}, {.fd = s->stop_fd, .events = POLLIN}};
    int n = poll(p, 2, timeout_ms);
    if (n < 0 && errno != EINTR)
        return failed(s, errno);
    if (n > 0 && p[1].revents)
        return SP_STOPPED;
    return n == 0 ? SP_AGAIN : SP_OK;
}

/* Writes what a read brought to the recording, before anybody parses it. */
static sp_status record(sp_stream *s, const struct iovec *iov, size_t n)
{
    for (; s->record_fd >= 0 && n; iov++) {
        size_t len = iov->iov_len < n ? iov->iov_len : n;
        int err = sp_write_all(s->record_fd, iov->iov_base, len);
        if (err)
            return failed(s, err);
        n -= len;
    }
    return SP_OK;
}

/* The peer's host or the way to it is gone: that is no failure of this host.  Beside ETIMEDOUT it is
 * what a router last said, which a timeout passes on (Linux net/ipv4/icmp.c, icmp_err_convert;
 * net/ipv6/icmp.c, icmpv6_err_convert). */
static bool is_lost(int err)
{
    switch (err) {
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case EHOSTDOWN:
    case ENETUNREACH:
    case ENETDOWN:
    case ENETRESET:
    case ENONET:
    case ECONNABORTED:
    case ECONNREFUSED:
    case ENOPROTOOPT:
    case EPROTO:
    case EACCES:
        return true;
    default:
        return false;
    }
}

/* SP_AGAIN: the wire is quiet. */
static sp_status read_now(sp_stream *s, struct iovec *iov, int n_iov, size_t *got)
{
    for (;;) {
        ssize_t n = readv(s->fd, iov, n_iov);
        if (n > 0) {
            s->total += (uint64_t)n;
            *got = (size_t)n;
            return record(s, iov, (size_t)n);
        }
        if (n == 0)
            return SP_EOF;
        if (errno == EINTR)
            continue;
        /* A peer that resets the connection has closed the wire: its process ended. */
        if (errno == ECONNRESET)
            return SP_EOF;
        if (is_lost(errno)) {
            s->err = errno;
            return SP_EOF;
        }
        return errno == EAGAIN ? SP_AGAIN : failed(s, errno);
    }
}

sp_status sp_stream_wait(sp_stream *s, int timeout_ms)
{
    if (s->before_wait)
        s->before_wait(s->before_wait_arg);
    return wait_readable(s, timeout_ms);
}

static sp_status read_wire(sp_stream *s, struct iovec *iov, int n_iov, size_t *got, int timeout_ms)
{
    sp_status st;
    while ((st = read_now(s, iov, n_iov, got)) == SP_AGAIN)
        if ((st = sp_stream_wait(s, timeout_ms)) != SP_OK)
            break;
    return st;
}

sp_status sp_stream_need(sp_stream *s, size_t n, size_t most, int timeout_ms)
{
    while (sp_stream_unread(s) < n) {
        if (s->pos + n > sizeof s->buf || s->pos == s->end) {
            memmove(s->buf, s->buf + s->pos, sp_stream_unread(s));
            s->end -= s->pos;
            s->pos = 0;
        }
        size_t room = sizeof s->buf - s->end, got = 0;
        struct iovec iov = {s->buf + s->end, room < most ? room : most};
        sp_status st = read_wire(s, &iov, 1, &got, timeout_ms);
        if (st != SP_OK)
            return st;
        s->end += got;
    }
    return SP_OK;
}

static size_t take(sp_stream *s, uint8_t *dst, size_t n)
{
    size_t have = sp_stream_unread(s);
    n = n < have ? n : have;
    memcpy(dst, s->buf + s->pos, n);
    s->pos += n;
    return n;
}

sp_status sp_stream_read(sp_stream *s, uint8_t *dst, size_t n, size_t *got, int timeout_ms)
{
    while (*got < n) {
        sp_status st = sp_stream_need(s, 1, sizeof s->buf, timeout_ms);
        if (st != SP_OK)
            return st;
        *got += take(s, dst + *got, n - *got);
    }
    return SP_OK;
}

sp_status sp_stream_peek(sp_stream *s, uint8_t *dst, size_t n, int timeout_ms)
{
    sp_status st = sp_stream_need(s, n, sizeof s->buf, timeout_ms);
    if (st == SP_OK)
        memcpy(dst, s->buf + s->pos, n);
    return st;
}

sp_status sp_stream_some(sp_stream *s, uint8_t *dst, size_t n, size_t *got, int timeout_ms)
{
    sp_status st = sp_stream_need(s, 1, sizeof s->buf, timeout_ms);
    if (st == SP_OK)
        *got = take(s, dst, n);
    return st;
}

sp_status sp_stream_scatter(sp_stream *s, struct iovec *iov, int n_iov, size_t *got, int timeout_ms)
{
    return read_wire(s, iov, n_iov, got, timeout_ms);
}

sp_status sp_stream_scatter_now(sp_stream *s, struct iovec *iov, int n_iov, size_t *got)
{
    return read_now(s, iov, n_iov, got);
}
