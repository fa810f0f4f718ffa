#include "back/bitmaps.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "back/wire.h"
#include "shared/message.h"

/* QEMU migration/ram.c RAMBLOCK_RECV_BITMAP_ENDING */
static const uint64_t BITMAP_END = 0x0123456789abcdefULL;

int sp_rp_bitmap(sp_return_path *rp, const sp_word *received, uint32_t block)
{
    int rc = -ENOBUFS;
    pthread_mutex_lock(&rp->lock);
    if (rp->n_bitmaps < SP_MAX_BLOCKS) {
        rp->received = received;
        rp->bitmaps[rp->n_bitmaps++] = block;
        atomic_store(&rp->posted, 1);
        rc = 0;
    }
    pthread_mutex_unlock(&rp->lock);
    sp_bell_ring(&rp->control->requests);
    return rc;
}

/* A block whose received bitmap is wanted; UINT32_MAX: none. */
static uint32_t take_bitmap(sp_return_path *rp)
{
    uint32_t block = UINT32_MAX;
    pthread_mutex_lock(&rp->lock);
    if (rp->n_bitmaps) {
        block = rp->bitmaps[0];
        memmove(rp->bitmaps, rp->bitmaps + 1, --rp->n_bitmaps * sizeof *rp->bitmaps);
    }
    pthread_mutex_unlock(&rp->lock);
    return block;
}

static sp_status write_bitmap(sp_return_path *rp, uint32_t block)
{
    const sp_block *b = &rp->control->blocks[block];
    size_t len = strnlen(b->name, sizeof b->name);
    sp_status st = SP_OK;
    uint64_t words = (sp_block_pages(b) + 63) / 64;
    uint8_t *at = sp_put(sp_put(rp->out, MSG_RECV_BITMAP, 2), 1 + len, 2);
    at = sp_put(at, len, 1);
    memcpy(at, b->name, len);
    rp->n_out = (size_t)(sp_put(at + len, words * 8, 8) - rp->out);
    for (uint64_t i = 0; i < words; i++, rp->n_out += 8) {
        if (rp->n_out + 8 > sizeof rp->out && (st = sp_rp_flush(rp)) != SP_OK)
            return st;
        uint64_t word = htole64(atomic_load(&rp->received[b->first_bit / 64 + i]));
        memcpy(rp->out + rp->n_out, &word, 8);
    }
    if ((st = sp_rp_flush(rp)) != SP_OK)
        return st;
    rp->n_out = (size_t)(sp_put(rp->out, BITMAP_END, 8) - rp->out);
    return sp_rp_flush(rp);
}

sp_status sp_rp_write_bitmaps(sp_return_path *rp)
{
    sp_status st = SP_OK;
    uint32_t block;
    while (st == SP_OK && (block = take_bitmap(rp)) != UINT32_MAX)
        st = write_bitmap(rp, block);
    return st;
}
