/* RAM records through a socket, in precopy and postcopy, with both placements.
 *
 * Pages are long and mostly the same to a parser, so an input is a little program that writes a stream
 * and says what else happens; its words are in the table at the end.  Byte 0 chooses the world.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fuzz.h"
#include "reader.h"

enum { MOST_PENDING = 64 * 1024, MOST_SENT = 1024 * 1024, ARG_BITS = 3 };
enum { STRAIGHT = 1, POSTCOPY = 2, ALL_REQUESTED = 4 };
static const char *const NAMES[WORLD_BLOCKS] = {"pc.ram", "pc.bios"};

typedef struct program {
    const uint8_t *at, *end;
    world *w;
    uint64_t page;
    uint32_t block;
    uint8_t fill;
    int over; /* the reader has refused something */
    size_t pending, sent;
    uint8_t stream[MOST_PENDING];
    uint8_t held[WORLD_BLOCKS][256]; /* as last seen: pages that may not change any more */
    uint8_t *seen[WORLD_BLOCKS];
} program;

static uint8_t next(program *p)
{
    return p->at < p->end ? *p->at++ : 0;
}

/* `continue`, postcopy: a page that a guest may see stays as it is. */
static void check_held(program *p)
{
    world *w = p->w;
    for (uint32_t b = 0; w->written && w->ram->postcopy && b < WORLD_BLOCKS; b++)
        for (uint64_t n = 0; n < WORLD_PAGES[b]; n++) {
            uint8_t *seen = p->seen[b] + n * SP_PAGE_BYTES, *page = w->ram->alias[b] + n * SP_PAGE_BYTES;
            int here = sp_bit_test(w->received, world_bit(w, b, n));
            CHECK(here || !p->held[b][n]);
            if (p->held[b][n])
                CHECK_EQ(memcmp(seen, page, SP_PAGE_BYTES), 0);
            else if (here)
                memcpy(seen, page, SP_PAGE_BYTES);
            p->held[b][n] = (uint8_t)here;
        }
}

/* Sends what is pending but the last `keep` bytes, and lets the reader read. */
static void deliver(program *p, size_t keep)
{
    size_t n = p->pending > keep ? p->pending - keep : 0;
    sp_status st = SP_EOS;
    world_send(p->w, p->stream, n);
    memmove(p->stream, p->stream + n, p->pending - n);
    p->pending -= n;
    while (st == SP_EOS)
        st = sp_ram_records(p->w->ram);
    p->over = st != SP_AGAIN;
    CHECK(st == SP_AGAIN || st >= SP_MEM_SIZE);
    reader_work(p->w);
    reader_check(p->w);
    check_held(p);
}

static void put(program *p, const void *bytes, size_t n)
{
    if (n > MOST_PENDING - p->pending)
        deliver(p, 0);
    p->sent += n;
    if (p->over || p->sent > MOST_SENT)
        return;
    memcpy(p->stream + p->pending, bytes, n);
    p->pending += n;
}

static void put_header(program *p, uint64_t flags, int named)
{
    uint64_t be = __builtin_bswap64(p->page * SP_PAGE_BYTES | flags | (named ? 0 : SP_RAM_CONTINUE));
    put(p, &be, sizeof be);
    if (!named)
        return;
    uint8_t len = (uint8_t)strlen(NAMES[p->block]);
    put(p, &len, 1);
    put(p, NAMES[p->block], len);
}

static void put_page(program *p, int named)
{
    static uint8_t bytes[SP_PAGE_BYTES];
    memset(bytes, ++p->fill, sizeof bytes);
    put_header(p, SP_RAM_PAGE, named);
    put(p, bytes, sizeof bytes);
}

static void put_zero(program *p, int named)
{
    put_header(p, SP_RAM_ZERO, named);
    put(p, "", 1);
}

static void raw(program *p, unsigned arg)
{
    size_t n = arg + 1u, left = (size_t)(p->end - p->at);
    n = n < left ? n : left;
    put(p, p->at, n);
    p->at += n;
}

static void named(program *p, unsigned arg)
{
    p->block = arg & 1;
    p->page = next(p);
    if (arg & 2)
        put_zero(p, 1);
    else
        put_page(p, 1);
}

static void pages(program *p, unsigned arg)
{
    for (unsigned i = 0; i <= arg; i++, p->page++)
        put_page(p, 0);
}

static void zeros(program *p, unsigned arg)
{
    for (unsigned i = 0; i <= arg; i++, p->page++)
        put_zero(p, 0);
}

static void payload(program *p, unsigned arg)
{
    static const uint8_t bytes[128] = {1, 2, 3};
    for (unsigned i = 0; i <= arg; i++)
        put(p, bytes, sizeof bytes);
}

static void deliver_some(program *p, unsigned arg)
{
    deliver(p, arg);
}

static void end_section(program *p, unsigned arg)
{
    uint64_t be = __builtin_bswap64((uint64_t)SP_RAM_EOS);
    put(p, &be, sizeof be);
    deliver(p, arg);
}

static void listen(program *p)
{
    deliver(p, 0);
    if (p->over || p->w->ram->in_page)
        return;
    CHECK_EQ(sp_hand_drain(p->w->ram), SP_OK);
    p->w->ram->postcopy = 1;
    check_held(p);
}

static void discard(program *p)
{
    uint64_t range[2] = {next(p) * (uint64_t)SP_PAGE_BYTES, next(p) * (uint64_t)SP_PAGE_BYTES};
    uint32_t block = next(p) & 1;
    size_t bad;
    deliver(p, 0);
    if (p->over || p->w->ram->postcopy || p->w->ram->in_page)
        return;
    sp_status st = sp_hand_discards(p->w->ram, block, range, 1, &bad);
    CHECK(st == SP_OK || st == SP_OUTSIDE_BLOCK);
    reader_work(p->w);
    reader_check(p->w);
}

static void request(program *p, unsigned n)
{
    uint64_t first = next(p) % WORLD_PAGES[0], left = WORLD_PAGES[0] - first;
    sp_bits_set(p->w->requested, world_bit(p->w, 0, first), n < left ? n : left);
}

static void delta(program *p)
{
    uint8_t head[3] = {1, 0, next(p)};
    size_t left = (size_t)(p->end - p->at), n = head[2] < left ? head[2] : left;
    head[2] = (uint8_t)n;
    put_header(p, SP_RAM_XBZRLE, 0);
    put(p, head, sizeof head);
    put(p, p->at, n);
    p->at += n;
}

static void other(program *p, unsigned arg)
{
    switch (arg & 3) {
    case 0:
        listen(p);
        break;
    case 1:
        discard(p);
        break;
    case 2:
        delta(p);
        break;
    default:
        request(p, arg);
    }
}

/* A word is a byte: its kind in the low bits, its argument in the others. */
static void (*const WORDS[1 << ARG_BITS])(program *p, unsigned arg) = {
    raw, named, pages, zeros, payload, deliver_some, end_section, other,
};

static void run(program *p)
{
    while (p->at < p->end && !p->over && p->sent <= MOST_SENT) {
        unsigned word = *p->at++;
        WORDS[word % (1 << ARG_BITS)](p, word >> ARG_BITS);
    }
    if (!p->over)
        deliver(p, 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t how = size ? data[0] : 0;
    program *p = calloc(1, sizeof *p);
    p->at = data + (size > 0);
    p->end = data + size;
    p->w = reader_new((how & POSTCOPY) != 0, how & STRAIGHT);
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        p->seen[b] = malloc(WORLD_PAGES[b] * SP_PAGE_BYTES);
    for (uint32_t b = 0; (how & ALL_REQUESTED) && b < WORLD_BLOCKS; b++)
        sp_bits_set(p->w->requested, world_bit(p->w, b, 0), WORLD_PAGES[b]);
    run(p);
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        free(p->seen[b]);
    free(p);
    return 0;
}
