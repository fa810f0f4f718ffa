#include "stream/ram.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "stream/hand.h"
#include "stream/precopy.h"
#include "stream/preempt.h"
#include "stream/route.h"

enum {
    XBZRLE_ENCODING = 1, /* QEMU migration/ram.c ENCODING_FLAG_XBZRLE */
    MOST_COMPRESSED = SP_PAGE_BYTES + 14 /* zlib's compressBound() of a page */
};

sp_ram *sp_ram_new(sp_stream *s, sp_control *c, sp_word *received, sp_word *requested,
                   uint8_t *pool, _Atomic uint32_t *stop)
{
    sp_ram *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->stream = s;
    r->control = c;
    r->received = received;
    r->requested = requested;
    r->pool = pool;
    r->stop = stop;
    r->timeout_ms = -1;
    r->guess = 4;
    r->own_uffd = -1;
    for (uint32_t i = 0; i < SP_MAX_BLOCKS; i++)
        r->block_fd[i] = -1;
    return r;
}

void sp_ram_preempt(sp_ram *r, sp_ram *main)
{
    r->main = main;
    r->postcopy = 1;
}

void sp_ram_go_straight(sp_ram *r, sp_word *written)
{
    r->written = written;
}

void sp_ram_free(sp_ram *r)
{
    free(r);
}

void sp_ram_forget_block(sp_ram *r)
{
    r->have_block = 0;
}

static uint64_t be64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return __builtin_bswap64(v);
}

/* In postcopy little is read into the buffer, because what stands there is copied once more. */
static sp_status need(sp_ram *r, size_t n)
{
    sp_stream *s = r->stream;
    if (sp_stream_unread(s) >= n)
        return SP_OK;
    sp_status st = sp_hand_all(r);
    if (st != SP_OK)
        return st;
    st = sp_stream_need(s, n, r->postcopy ? 16384 : SP_STREAM_BUFFER, r->timeout_ms);
    if (st == SP_SYS)
        r->err = s->err;
    return st;
}

/* Reads the block name behind a header; *taken grows by its length.  Consumes nothing. */
static sp_status named_block(sp_ram *r, size_t *taken, uint32_t *block)
{
    sp_status st = need(r, *taken + 1);
    if (st != SP_OK)
        return st;
    size_t len = r->stream->buf[r->stream->pos + *taken];
    if (len == 0)
        return SP_EMPTY_NAME;
    if ((st = need(r, *taken + 1 + len)) != SP_OK)
        return st;
    const uint8_t *name = r->stream->buf + r->stream->pos + *taken + 1;
    int found = sp_control_find(r->control, name, len);
    *taken += 1 + len;
    if (found >= 0) {
        *block = (uint32_t)found;
        return SP_OK;
    }
    memcpy(r->name, name, len);
    r->name_len = (uint32_t)len;
    return SP_UNKNOWN_BLOCK;
}

static sp_status locate(sp_ram *r, size_t *taken, uint32_t *block)
{
    uint64_t offset = r->header & ~0xfffULL;
    if (r->header & SP_RAM_CONTINUE) {
        if (!r->have_block)
            return SP_NO_BLOCK;
        *block = r->block;
    } else {
        sp_status st = named_block(r, taken, block);
        if (st != SP_OK)
            return st;
    }
    const sp_block *b = &r->control->blocks[*block];
    r->bad_block = *block;
    return offset >= b->bytes ? SP_OUTSIDE_BLOCK : SP_OK;
}

static void enter_block(sp_ram *r, uint32_t block, size_t taken)
{
    r->block = block;
    r->have_block = 1;
    r->stream->pos += taken;
}

static sp_status zero_record(sp_ram *r)
{
    size_t taken = 8;
    uint32_t block;
    sp_status st = locate(r, &taken, &block);
    if (st != SP_OK || (st = need(r, taken + 1)) != SP_OK)
        return st;
    r->fill = r->stream->buf[r->stream->pos + taken];
    if (r->fill != 0)
        return SP_BAD_FILL;
    uint64_t page = r->header / SP_PAGE_BYTES;
    /* Pages before this one, of whatever block, first: last wins. */
    if (!r->postcopy && (st = sp_precopy_flush(r)) != SP_OK)
        return st;
    enter_block(r, block, taken + 1);
    if (r->main)
        st = sp_preempt_zero(r, page);
    else
        st = r->postcopy ? sp_hand_zero(r, page) : sp_precopy_zero(r, page);
    if (st == SP_OK)
        sp_count(&r->control->totals.duplicate, 1);
    return st;
}

static sp_status page_record(sp_ram *r)
{
    size_t taken = 8;
    uint32_t block;
    sp_status st = locate(r, &taken, &block);
    if (st != SP_OK)
        return st;
    /* Gathered pages are written into r->block. */
    if (!r->postcopy && block != r->block && (st = sp_precopy_flush(r)) != SP_OK)
        return st;
    /* Whether this is a second arrival shows only when the run before it counts as received. */
    if (r->postcopy && r->written && (st = sp_hand_flush(r)) != SP_OK)
        return st;
    enter_block(r, block, taken);
    r->in_page = 1;
    r->dst = NULL;
    r->got = 0;
    r->page = r->header / SP_PAGE_BYTES;
    return SP_OK;
}

/* What is left of an encoded page behind `taken` bytes, its length among them. */
static sp_status encoded_rest(sp_ram *r, size_t taken, size_t most)
{
    return r->encoded > most ? SP_BAD_LENGTH : need(r, taken + r->encoded);
}

/* u8 encoding, be16 length, the difference to the page as it stands, which may have come just now. */
static sp_status xbzrle_record(sp_ram *r)
{
    size_t taken = 8;
    uint32_t block;
    if (r->postcopy)
        return SP_NOT_IN_POSTCOPY;
    sp_status st = locate(r, &taken, &block);
    if (st != SP_OK || (st = need(r, taken + 1)) != SP_OK)
        return st;
    r->fill = r->stream->buf[r->stream->pos + taken];
    if (r->fill != XBZRLE_ENCODING)
        return SP_BAD_ENCODING;
    if ((st = need(r, taken + 3)) != SP_OK)
        return st;
    const uint8_t *p = r->stream->buf + r->stream->pos + taken;
    r->encoded = (uint32_t)(p[1] << 8 | p[2]);
    taken += 3;
    if ((st = encoded_rest(r, taken, SP_PAGE_BYTES)) != SP_OK || (st = sp_hand_all(r)) != SP_OK)
        return st;
    st = sp_precopy_xbzrle(r, block, r->stream->buf + r->stream->pos + taken, r->encoded);
    if (st == SP_OK)
        enter_block(r, block, taken + r->encoded);
    return st;
}

/* be32 length, zlib data. */
static sp_status compressed_record(sp_ram *r)
{
    size_t taken = 8;
    uint32_t block;
    sp_status st = locate(r, &taken, &block);
    if (st != SP_OK || (st = need(r, taken + 4)) != SP_OK)
        return st;
    memcpy(&r->encoded, r->stream->buf + r->stream->pos + taken, 4);
    r->encoded = __builtin_bswap32(r->encoded);
    taken += 4;
    if ((st = encoded_rest(r, taken, MOST_COMPRESSED)) != SP_OK || (st = sp_hand_all(r)) != SP_OK)
        return st;
    r->compressed = r->stream->buf + r->stream->pos + taken;
    r->record = taken + r->encoded;
    return SP_COMPRESSED;
}

sp_status sp_ram_inflated(sp_ram *r, const uint8_t *page)
{
    uint64_t number = r->header / SP_PAGE_BYTES;
    enter_block(r, r->bad_block, r->record);
    if (!r->main)
        return r->postcopy ? sp_route_whole(r, number, page) : sp_precopy_whole(r, number, page);
    r->page = number; /* QEMU sends none there, but who does must not write to the rings */
    sp_status st = sp_preempt_page(r, page);
    if (st == SP_OK)
        sp_count(&r->control->totals.normal, 1);
    return st;
}

/* Takes one record header; a PAGE leaves `in_page` set. */
static sp_status take_header(sp_ram *r)
{
    sp_status st = need(r, 8);
    if (st != SP_OK)
        return st;
    r->at = sp_stream_offset(r->stream);
    r->header = be64(r->stream->buf + r->stream->pos);
    switch (r->header & 0xfff) {
    case SP_RAM_PAGE:
    case SP_RAM_PAGE | SP_RAM_CONTINUE:
        return page_record(r);
    case SP_RAM_ZERO:
    case SP_RAM_ZERO | SP_RAM_CONTINUE:
        return zero_record(r);
    case SP_RAM_EOS:
        r->stream->pos += 8;
        return SP_EOS;
    case SP_RAM_MEM_SIZE:
        r->stream->pos += 8;
        r->mem_size = r->header & ~0xfffULL;
        return SP_MEM_SIZE;
    case SP_RAM_XBZRLE:
    case SP_RAM_XBZRLE | SP_RAM_CONTINUE:
        return xbzrle_record(r);
    case SP_RAM_COMPRESSED:
    case SP_RAM_COMPRESSED | SP_RAM_CONTINUE:
        return compressed_record(r);
    case 0x01:
    case 0x80:
        return SP_UNSUPPORTED;
    case SP_RAM_FLUSH:
        if (r->main)
            return SP_UNSUPPORTED;
        r->stream->pos += 8;
        return SP_FLUSH;
    default:
        return SP_BAD_FLAGS;
    }
}

static sp_status precopy_payload(sp_ram *r)
{
    sp_status st = need(r, SP_PAGE_BYTES);
    if (st != SP_OK)
        return st;
    const uint8_t *bytes = r->stream->buf + r->stream->pos;
    if ((st = sp_precopy_page(r, bytes)) != SP_OK)
        return st;
    r->stream->pos += SP_PAGE_BYTES;
    r->in_page = 0;
    return SP_OK;
}

static sp_status preempt_payload(sp_ram *r)
{
    sp_status st = need(r, SP_PAGE_BYTES);
    if (st != SP_OK)
        return st;
    if ((st = sp_preempt_page(r, r->stream->buf + r->stream->pos)) != SP_OK)
        return st;
    r->stream->pos += SP_PAGE_BYTES;
    r->in_page = 0;
    sp_count(&r->control->totals.normal, 1);
    return SP_OK;
}

static sp_status ahead(sp_ram *r)
{
    bool bet;
    sp_status st = sp_route_ahead(r, &bet);
    return st == SP_OK && !bet ? take_header(r) : st;
}

/* In precopy a page whose header stood in the buffer is gathered there; one that was bet on has its
 * place already. */
static sp_status step(sp_ram *r)
{
    if (r->main)
        return r->in_page ? preempt_payload(r) : take_header(r);
    if (r->in_page)
        return r->postcopy || r->dst ? sp_route_payload(r) : precopy_payload(r);
    if ((r->postcopy || r->written) && r->have_block && sp_stream_unread(r->stream) == 0)
        return ahead(r);
    return take_header(r);
}

sp_status sp_ram_records(sp_ram *r)
{
    sp_status st;
    r->stream->before_wait = sp_hand_quiet;
    r->stream->before_wait_arg = r;
    do {
        /* A wire that is never empty never polls the stop switch. */
        st = atomic_load_explicit(r->stop, memory_order_relaxed) ? SP_STOPPED : step(r);
    } while (st == SP_OK);
    r->stream->before_wait = NULL;
    sp_hand_quiet(r); /* whoever reads on does not know of us */
    if (st == SP_STOPPED || st == SP_SYS || st == SP_SHARD_FAILED)
        return st;
    /* Whatever ended the records: pages that came before it are good. */
    sp_status flushed = sp_hand_all(r);
    return flushed != SP_OK ? flushed : st;
}
