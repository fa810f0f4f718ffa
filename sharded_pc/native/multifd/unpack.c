#include "multifd/unpack.h"

#include <stdlib.h>

#include "multifd/packet.h"

#ifdef SP_HAVE_ZLIB
#include <zlib.h>
#endif
#ifdef SP_HAVE_ZSTD
#include <zstd.h>
#endif

struct sp_unpack {
    uint32_t method;
#ifdef SP_HAVE_ZLIB
    z_stream zlib;
#endif
#ifdef SP_HAVE_ZSTD
    ZSTD_DStream *zstd;
#endif
};

int sp_unpack_knows(uint32_t method)
{
#ifdef SP_HAVE_ZLIB
    if (method == SP_PACKET_ZLIB)
        return 1;
#endif
#ifdef SP_HAVE_ZSTD
    if (method == SP_PACKET_ZSTD)
        return 1;
#endif
    (void)method;
    return 0;
}

static int start(sp_unpack *u)
{
#ifdef SP_HAVE_ZLIB
    if (u->method == SP_PACKET_ZLIB)
        return inflateInit(&u->zlib) == Z_OK ? 0 : -1;
#endif
#ifdef SP_HAVE_ZSTD
    if (u->method == SP_PACKET_ZSTD)
        return (u->zstd = ZSTD_createDStream()) ? 0 : -1;
#endif
    (void)u;
    return -1;
}

sp_unpack *sp_unpack_new(uint32_t method)
{
    sp_unpack *u = calloc(1, sizeof *u);
    if (!u)
        return NULL;
    u->method = method;
    if (start(u)) {
        free(u);
        return NULL;
    }
    return u;
}

void sp_unpack_free(sp_unpack *u)
{
    if (!u)
        return;
#ifdef SP_HAVE_ZLIB
    if (u->method == SP_PACKET_ZLIB)
        inflateEnd(&u->zlib);
#endif
#ifdef SP_HAVE_ZSTD
    if (u->method == SP_PACKET_ZSTD)
        ZSTD_freeDStream(u->zstd);
#endif
    free(u);
}

/* The tail of a flush brings no bytes: it is taken with one byte of room that must stay empty. */
#ifdef SP_HAVE_ZLIB
static int unpack_zlib(z_stream *z, const uint8_t *packed, size_t size, uint8_t *out, size_t n)
{
    uint8_t none;
    z->next_in = (uint8_t *)(uintptr_t)packed;
    z->avail_in = (unsigned)size;
    z->next_out = out;
    z->avail_out = (unsigned)n;
    while (z->avail_out)
        if (inflate(z, Z_SYNC_FLUSH) != Z_OK)
            return -1;
    z->next_out = &none;
    z->avail_out = 1;
    while (z->avail_in)
        if (inflate(z, Z_SYNC_FLUSH) != Z_OK || z->avail_out == 0)
            return -1;
    return 0;
}
#endif

#ifdef SP_HAVE_ZSTD
static int unpack_zstd(ZSTD_DStream *z, const uint8_t *packed, size_t size, uint8_t *out, size_t n)
{
    uint8_t none;
    ZSTD_inBuffer in = {packed, size, 0};
    ZSTD_outBuffer to = {out, n, 0}, rest = {&none, 1, 0};
    while (to.pos < to.size) {
        size_t was = in.pos + to.pos;
        if (ZSTD_isError(ZSTD_decompressStream(z, &to, &in)) || in.pos + to.pos == was)
            return -1;
    }
    while (in.pos < in.size) {
        size_t was = in.pos;
        if (ZSTD_isError(ZSTD_decompressStream(z, &rest, &in)) || rest.pos || in.pos == was)
            return -1;
    }
    return 0;
}
#endif

int sp_unpack_some(sp_unpack *u, const uint8_t *packed, size_t size, uint8_t *out, size_t n)
{
#ifdef SP_HAVE_ZLIB
    if (u->method == SP_PACKET_ZLIB)
        return unpack_zlib(&u->zlib, packed, size, out, n);
#endif
#ifdef SP_HAVE_ZSTD
    if (u->method == SP_PACKET_ZSTD)
        return unpack_zstd(u->zstd, packed, size, out, n);
#endif
    (void)u, (void)packed, (void)size, (void)out, (void)n;
    return -1;
}
