/* Pages that arrive before LISTENING: straight into the segment, last one wins. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "stream/precopy.h"
#include "stream/straight.h"
#include "stream/xbzrle.h"

static sp_status failed(sp_ram *r, int err)
{
    r->err = err;
    return SP_SYS;
}

/* Writes n gathered pages, which are neighbours, in as few calls as the kernel allows. */
static sp_status write_pages(sp_ram *r, uint32_t n)
{
    struct iovec *iov = r->gather;
    off_t at = (off_t)(r->gather_first * SP_PAGE_BYTES);
    while (n) {
        ssize_t w = pwritev(r->block_fd[r->block], iov, (int)n, at);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return failed(r, w ? errno : ENOSPC);
        at += w;
        while (n && (size_t)w >= iov->iov_len) {
            w -= (ssize_t)iov->iov_len;
            iov++, n--;
        }
        if (n && w) {
            iov->iov_base = (char *)iov->iov_base + w;
            iov->iov_len -= (size_t)w;
        }
    }
    return SP_OK;
}

sp_status sp_precopy_flush(sp_ram *r)
{
    uint32_t n = r->n_gather;
    if (n == 0)
        return SP_OK;
    r->n_gather = 0;
    sp_status st = write_pages(r, n);
    if (st != SP_OK)
        return st;
    uint64_t bit = r->control->blocks[r->block].first_bit + r->gather_first;
    sp_bits_set(r->received, bit, n);
    if (r->written)
        sp_bits_set(r->written, bit, n);
    sp_count(&r->control->totals.normal, n);
    return SP_OK;
}

sp_status sp_precopy_page(sp_ram *r, const uint8_t *bytes)
{
    if (r->n_gather == SP_GATHER || r->page != r->gather_first + r->n_gather) {
        sp_status st = sp_precopy_flush(r);
        if (st != SP_OK)
            return st;
    }
    if (r->n_gather == 0)
        r->gather_first = r->page;
    r->gather[r->n_gather++] = (struct iovec){(void *)(uintptr_t)bytes, SP_PAGE_BYTES};
    return SP_OK;
}

/* A page that never had data is a hole and reads as zeros already; one that had is punched. */
sp_status sp_precopy_zero(sp_ram *r, uint64_t page)
{
    uint64_t bit = r->control->blocks[r->block].first_bit + page;
    bool first = sp_bit_claim(r->received, bit);
    if (r->written)
        return sp_straight_zeros(r, r->block, page, 1);
    if (first)
        return SP_OK;
    int rc = fallocate(r->block_fd[r->block], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       (off_t)(page * SP_PAGE_BYTES), SP_PAGE_BYTES);
    return rc ? failed(r, errno) : SP_OK;
}

/* What is not received may hold anything (`continue`) and counts as zeros: a source has sent nothing
 * there that it could build on. */
static sp_status read_page(sp_ram *r, uint32_t block, uint64_t page, uint8_t *bytes)
{
    off_t at = (off_t)(page * SP_PAGE_BYTES);
    ssize_t n = 0;
    memset(bytes, 0, SP_PAGE_BYTES);
    if (sp_bit_test(r->received, r->control->blocks[block].first_bit + page))
        while ((n = pread(r->block_fd[block], bytes, SP_PAGE_BYTES, at)) < 0 && errno == EINTR) {
        }
    return n < 0 ? failed(r, errno) : SP_OK;
}

/* By descriptor, as all that comes out of the stream's buffer. */
static sp_status write_page(sp_ram *r, uint32_t block, uint64_t page, const uint8_t *bytes)
{
    uint64_t bit = r->control->blocks[block].first_bit + page;
    for (size_t done = 0; done < SP_PAGE_BYTES;) {
        off_t at = (off_t)(page * SP_PAGE_BYTES + done);
        ssize_t w = pwrite(r->block_fd[block], bytes + done, SP_PAGE_BYTES - done, at);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return failed(r, w ? errno : ENOSPC);
        done += (size_t)w;
    }
    sp_bits_set(r->received, bit, 1);
    if (r->written)
        sp_bits_set(r->written, bit, 1);
    r->page = page;
    return SP_OK;
}

sp_status sp_precopy_xbzrle(sp_ram *r, uint32_t block, const uint8_t *encoded, size_t n)
{
    uint8_t bytes[SP_PAGE_BYTES];
    uint64_t page = r->header / SP_PAGE_BYTES;
    sp_status st = read_page(r, block, page, bytes);
    if (st != SP_OK)
        return st;
    return sp_xbzrle_patch(bytes, encoded, n) ? write_page(r, block, page, bytes) : SP_BAD_ENCODED;
}

sp_status sp_precopy_whole(sp_ram *r, uint64_t page, const uint8_t *bytes)
{
    sp_status st = write_page(r, r->block, page, bytes);
    if (st == SP_OK)
        sp_count(&r->control->totals.normal, 1);
    return st;
}
