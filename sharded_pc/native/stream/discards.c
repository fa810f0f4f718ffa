/* Discard messages that stand whole in the stream's buffer, without Python for each.
 *
 * A million ranges come as 83 thousand messages.  This is the C twin of wire/commands.py (_discard)
 * and incoming.py (_discard) for messages with nothing wrong in them; any other is left where it
 * stands, and Python says what is wrong with it.
 */
#include <string.h>

#include "stream/discards.h"
#include "stream/hand.h"

/* QEMU migration/savevm.c: section type, be16 command, be16 length of the payload. */
enum { SECTION_COMMAND = 0x08, CMD_POSTCOPY_RAM_DISCARD = 6, HEAD = 5 };
/* Its payload: u8 version, u8 length of the name, the name, NUL, then be64 start and length. */
enum { AROUND_NAME = 3, PAIR = 16 };

typedef struct discard {
    uint32_t block;
    const uint8_t *pairs;
    size_t n;
    size_t bytes; /* of the whole message */
} discard;

typedef struct span {
    uint64_t start, length; /* bytes */
} span;

static size_t be16(const uint8_t *p)
{
    return (size_t)p[0] << 8 | p[1];
}

static span span_at(const discard *d, size_t i)
{
    uint64_t v[2];
    memcpy(v, d->pairs + i * PAIR, sizeof v);
    return (span){__builtin_bswap64(v[0]), __builtin_bswap64(v[1])};
}

/* Finds the parts of the message that starts at p; false unless it is whole and well-formed. */
static bool parse(const sp_control *c, const uint8_t *p, size_t have, discard *d)
{
    if (have < HEAD + AROUND_NAME || p[0] != SECTION_COMMAND ||
        be16(p + 1) != CMD_POSTCOPY_RAM_DISCARD)
        return false;
    size_t len = be16(p + 3), name_len = p[HEAD + 1];
    if (have < HEAD + len || name_len == 0 || len < AROUND_NAME + name_len + PAIR)
        return false;
    const uint8_t *name = p + HEAD + 2;
    size_t pairs = len - AROUND_NAME - name_len;
    if (p[HEAD] != 0 || name[name_len] != 0 || pairs % PAIR)
        return false;
    int block = sp_control_find(c, name, name_len);
    *d = (discard){(uint32_t)block, name + name_len + 1, pairs / PAIR, HEAD + len};
    return block >= 0;
}

static bool all_good(const sp_control *c, const discard *d)
{
    bool good = true;
    for (size_t i = 0; good && i < d->n; i++)
        good = sp_is_whole(&c->blocks[d->block], span_at(d, i).start, span_at(d, i).length);
    return good;
}

static sp_status apply(sp_ram *r, const discard *d)
{
    sp_status st = SP_OK;
    for (size_t i = 0; st == SP_OK && i < d->n; i++) {
        span s = span_at(d, i);
        st = sp_hand_discard(r, d->block, s.start / SP_PAGE_BYTES, s.length / SP_PAGE_BYTES);
    }
    return st;
}

sp_status sp_discards_ahead(sp_ram *r)
{
    sp_stream *s = r->stream;
    sp_status st = SP_OK;
    discard d;
    while (st == SP_OK && parse(r->control, s->buf + s->pos, sp_stream_unread(s), &d) &&
           all_good(r->control, &d)) {
        st = atomic_load_explicit(r->stop, memory_order_relaxed) ? SP_STOPPED : apply(r, &d);
        if (st == SP_OK)
            s->pos += d.bytes;
    }
    return st;
}
