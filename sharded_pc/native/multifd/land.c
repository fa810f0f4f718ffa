#define _GNU_SOURCE
#include "multifd/land.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static sp_status failed(sp_land *l, int err)
{
    l->err = err;
    return SP_SYS;
}

static sp_status write_run(sp_land *l, uint32_t block, uint64_t page, uint32_t pages,
                           const uint8_t *bytes)
{
    off_t at = (off_t)(page * SP_PAGE_BYTES);
    for (size_t left = (size_t)pages * SP_PAGE_BYTES; left;) {
        ssize_t w = pwrite(l->block_fd[block], bytes, left, at);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return failed(l, w ? errno : ENOSPC);
        at += w;
        bytes += w;
        left -= (size_t)w;
    }
    uint64_t bit = l->control->blocks[block].first_bit + page;
    if (l->written)
        sp_bits_set(l->written, bit, pages);
    sp_bits_set(l->received, bit, pages);
    return SP_OK;
}

sp_status sp_land_pages(sp_land *l, const sp_packet *p, uint32_t first, uint32_t n,
                        const uint8_t *bytes)
{
    for (uint32_t i = 0, run; i < n; i += run) {
        const uint64_t *page = p->page + first + i;
        for (run = 1; i + run < n && page[run] == page[0] + run;)
            run++;
        sp_status st = write_run(l, p->block, page[0], run, bytes + (size_t)i * SP_PAGE_BYTES);
        if (st != SP_OK)
            return st;
    }
    sp_count(&l->control->totals.normal, n);
    return SP_OK;
}

/* What never had data is a hole already; with `continue` populated memory stays, and is written. */
static sp_status land_zero(sp_land *l, uint32_t block, uint64_t page)
{
    static const uint8_t zeros[SP_PAGE_BYTES];
    uint64_t bit = l->control->blocks[block].first_bit + page;
    if (l->written && sp_bit_test(l->written, bit))
        return write_run(l, block, page, 1, zeros);
    if (sp_bit_claim(l->received, bit) || l->written)
        return SP_OK;
    int rc = fallocate(l->block_fd[block], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       (off_t)(page * SP_PAGE_BYTES), SP_PAGE_BYTES);
    return rc ? failed(l, errno) : SP_OK;
}

sp_status sp_land_zeros(sp_land *l, const sp_packet *p)
{
    for (uint32_t i = 0; i < p->zero; i++) {
        sp_status st = land_zero(l, p->block, p->page[p->normal + i]);
        if (st != SP_OK)
            return st;
    }
    sp_count(&l->control->totals.duplicate, p->zero);
    return SP_OK;
}
