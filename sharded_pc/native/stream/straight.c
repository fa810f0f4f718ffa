/* Payload straight into its RAMBlock (`continue` placement): where it lands, and what keeps a wrong
 * guess harmless.
 *
 * A page that is not received is in no guest, whatever stands in it: guests map it only by
 * UFFDIO_CONTINUE, and only received pages are continued.  So a read may bet on pages that are not
 * received, and on none that is.  What a lost bet or an older version left there is remembered in
 * `written`: a zero page must overwrite it.
 *
 * The preempt channel's loop writes and publishes pages meanwhile.  A bet lasts for one read that
 * does not wait, and is announced; a page that the other loop is about to write is claimed.  Each
 * side says its word first and looks at the other's then, so one of them sees the other: a bet is cut
 * short before a claimed page, a claim waits for a bet.  Who claimed sets `received` before it lets
 * go, and who bets looks at the claim before it looks at `received`.
 *
 * Bytes from the stream's buffer are written by descriptor, for a store into a full tmpfs would be
 * SIGBUS; a read into the alias then fails with EFAULT.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "stream/straight.h"

enum { ZERO_IOV = 64 };

/* A bet in one word: its first bit and how many pages; 0: none. */
enum { BET_SHIFT = 8 };
static_assert(SP_GUESS < 1 << BET_SHIFT, "a bet fits its word");

static bool covers(uint64_t bet, uint64_t bit)
{
    uint64_t first = bet >> BET_SHIFT, pages = bet & ((1 << BET_SHIFT) - 1);
    return bit >= first && bit - first < pages;
}

static uint64_t bit_of(const sp_ram *r, uint64_t page)
{
    return r->control->blocks[r->block].first_bit + page;
}

/* A second arrival of a page that guests may have mapped goes nowhere. */
uint8_t *sp_straight_page(sp_ram *r)
{
    r->trashed = r->postcopy && sp_bit_test(r->received, bit_of(r, r->page));
    if (r->trashed)
        return r->trash;
    sp_bits_set(r->written, bit_of(r, r->page), 1);
    return r->alias[r->block] + r->page * SP_PAGE_BYTES;
}

uint64_t sp_straight_bet(sp_ram *r, uint64_t first, uint64_t most)
{
    uint64_t bit = bit_of(r, first);
    if (most == 0 || sp_bit_test(r->received, bit))
        return 0;
    uint64_t pages = sp_bits_run(r->received, bit, most);
    sp_bits_set(r->written, bit, pages);
    return pages;
}

uint64_t sp_straight_announce(sp_ram *r, uint64_t first, uint64_t most)
{
    uint64_t bit = bit_of(r, first), claim;
    if (most == 0)
        return 0;
    atomic_store(&r->bet, bit << BET_SHIFT | most);
    claim = atomic_load(&r->claim);
    if (claim > bit && claim - 1 - bit < most)
        most = claim - 1 - bit;
    uint64_t pages = sp_straight_bet(r, first, most);
    if (pages == 0)
        sp_straight_retract(r);
    return pages;
}

void sp_straight_retract(sp_ram *r)
{
    atomic_store(&r->bet, 0);
}

bool sp_straight_claim(sp_ram *r, uint64_t bit)
{
    atomic_store(&r->main->claim, bit + 1);
    while (covers(atomic_load(&r->main->bet), bit)) {
        if (atomic_load(r->stop)) {
            sp_straight_unclaim(r);
            return false;
        }
        sched_yield();
    }
    return true;
}

void sp_straight_unclaim(sp_ram *r)
{
    atomic_store(&r->main->claim, 0);
}

static sp_status failed(sp_ram *r, int err)
{
    r->err = err;
    return SP_SYS;
}

sp_status sp_straight_store(sp_ram *r, const uint8_t *bytes, size_t n)
{
    while (n) {
        off_t at = (off_t)(r->page * SP_PAGE_BYTES + r->got);
        ssize_t w = pwrite(r->block_fd[r->block], bytes, n, at);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return failed(r, w ? errno : ENOSPC);
        bytes += w;
        n -= (size_t)w;
        r->got += (size_t)w;
    }
    return SP_OK;
}

/* How many of at most `most` pages stand whole in the buffer, each behind the expected header. */
static uint64_t whole_pages(const sp_ram *r, uint64_t most)
{
    const sp_stream *s = r->stream;
    size_t at = s->pos + SP_PAGE_BYTES;
    uint64_t n = 1;
    for (; n < most && at + 8 + SP_PAGE_BYTES <= s->end; n++, at += 8 + SP_PAGE_BYTES) {
        uint64_t header;
        memcpy(&header, s->buf + at, 8);
        if (__builtin_bswap64(header) != ((r->page + n) * SP_PAGE_BYTES | SP_RAM_PAGE | SP_RAM_CONTINUE))
            break;
    }
    return n;
}

sp_status sp_straight_gather(sp_ram *r, uint64_t *pages)
{
    sp_stream *s = r->stream;
    struct iovec iov[SP_GUESS];
    *pages = 0;
    if (r->trashed || r->got || sp_stream_unread(s) < SP_PAGE_BYTES)
        return SP_OK;
    uint64_t most = sp_stripe_rest(r->control, &r->control->blocks[r->block], r->page);
    most = sp_straight_bet(r, r->page, most < SP_GUESS ? most : SP_GUESS);
    uint64_t n = most ? whole_pages(r, most) : 0;
    for (uint64_t i = 0; i < n; i++)
        iov[i] = (struct iovec){s->buf + s->pos + i * (8 + SP_PAGE_BYTES), SP_PAGE_BYTES};
    ssize_t w = n < 2 ? 0 : pwritev(r->block_fd[r->block], iov, (int)n, (off_t)(r->page * SP_PAGE_BYTES));
    if (w < 0 && errno != EINTR)
        return failed(r, errno);
    *pages = w > 0 ? (uint64_t)w / SP_PAGE_BYTES : 0; /* a part of a page is written again */
    if (*pages)
        s->pos += *pages * (8 + SP_PAGE_BYTES) - 8;
    return SP_OK;
}

static sp_status write_zeros(sp_ram *r, uint32_t block, uint64_t page, uint64_t pages)
{
    static const uint8_t zeros[SP_PAGE_BYTES];
    struct iovec iov[ZERO_IOV];
    for (int i = 0; i < ZERO_IOV; i++)
        iov[i] = (struct iovec){(void *)(uintptr_t)zeros, SP_PAGE_BYTES};
    off_t at = (off_t)(page * SP_PAGE_BYTES), end = at + (off_t)(pages * SP_PAGE_BYTES);
    while (at < end) {
        uint64_t left = ((uint64_t)(end - at) + SP_PAGE_BYTES - 1) / SP_PAGE_BYTES;
        iov[0].iov_len = SP_PAGE_BYTES - (size_t)(at % SP_PAGE_BYTES);
        ssize_t w = pwritev(r->block_fd[block], iov, left < ZERO_IOV ? (int)left : ZERO_IOV, at);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return failed(r, w ? errno : ENOSPC);
        at += w;
    }
    return SP_OK;
}

sp_status sp_straight_zeros(sp_ram *r, uint32_t block, uint64_t page, uint64_t pages)
{
    uint64_t bit = r->control->blocks[block].first_bit + page;
    for (uint64_t i = 0, n; i < pages; i += n) {
        n = sp_bits_run(r->written, bit + i, pages - i);
        if (!sp_bit_test(r->written, bit + i))
            continue;
        sp_status st = write_zeros(r, block, page + i, n);
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

sp_status sp_straight_unsent(sp_ram *r)
{
    uint32_t n_blocks = r->written ? atomic_load(&r->control->n_blocks) : 0;
    for (uint32_t block = 0; block < n_blocks; block++) {
        const sp_block *b = &r->control->blocks[block];
        uint64_t pages = sp_block_pages(b);
        for (uint64_t page = 0, n; page < pages; page += n) {
            n = sp_bits_run(r->received, b->first_bit + page, pages - page);
            if (sp_bit_test(r->received, b->first_bit + page))
                continue;
            sp_status st = sp_straight_zeros(r, block, page, n);
            if (st != SP_OK)
                return st;
        }
    }
    return SP_OK;
}
