/* A byte stream being read: descriptor, buffer, stop switch, optional recording.
 *
 * The one reader of the wire: Python takes control bytes through it, the RAM loop takes pages, so
 * no byte is ever buffered in two places.  The descriptor must be non-blocking; waiting happens in
 * poll() together with the stop switch.  Every function can be called again after SP_AGAIN.
 */
#ifndef SP_STREAM_H
#define SP_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "shared/status.h"

#define SP_STREAM_BUFFER (512u * 1024u)

typedef struct sp_stream {
    int fd;
    int stop_fd;   /* readable when the loop shall end; -1: none */
    int record_fd; /* -1: none */
    int err;       /* errno after SP_SYS; after SP_EOF too if the wire broke, 0 if it was closed */
    void (*before_wait)(void *); /* called when the wire is quiet, before the reader sleeps; or NULL */
    void *before_wait_arg;
    size_t pos, end;   /* unread bytes of buf */
    uint64_t total;    /* bytes taken off the wire */
    uint8_t buf[SP_STREAM_BUFFER];
} sp_stream;

sp_stream *sp_stream_new(int fd, int stop_fd, int record_fd);
void sp_stream_free(sp_stream *s);

/* Offset in the stream of the next byte to be parsed. */
uint64_t sp_stream_offset(const sp_stream *s);
/* Makes n unread bytes (n <= SP_STREAM_BUFFER) stand at buf[pos]; reads at most `most` per call of
 * the kernel.  timeout_ms: -1 waits. */
sp_status sp_stream_need(sp_stream *s, size_t n, size_t most, int timeout_ms);
/* Copies exactly n bytes out; *got carries progress over SP_AGAIN. */
sp_status sp_stream_read(sp_stream *s, uint8_t *dst, size_t n, size_t *got, int timeout_ms);
/* The same of n <= SP_STREAM_BUFFER bytes that stay unread. */
sp_status sp_stream_peek(sp_stream *s, uint8_t *dst, size_t n, int timeout_ms);
/* Whatever is there, at least one byte and at most n. */
sp_status sp_stream_some(sp_stream *s, uint8_t *dst, size_t n, size_t *got, int timeout_ms);
/* One scattered read; *got bytes (> 0) on SP_OK.  The buffer must be empty. */
sp_status sp_stream_scatter(sp_stream *s, struct iovec *iov, int n_iov, size_t *got,
                            int timeout_ms);

/* The same, but SP_AGAIN at once if the wire is quiet. */
sp_status sp_stream_scatter_now(sp_stream *s, struct iovec *iov, int n_iov, size_t *got);
/* Until there is something to read. */
sp_status sp_stream_wait(sp_stream *s, int timeout_ms);

static inline size_t sp_stream_unread(const sp_stream *s)
{
    return s->end - s->pos;
}

#endif
