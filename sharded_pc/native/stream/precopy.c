/* Pages that arrive before LISTENING: straight into the segment, last one wins. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "stream/precopy.h"
#include "stream/straight.h"

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
