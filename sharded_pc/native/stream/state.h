/* Where a reader of RAM records stands, and what it works on: the files of this folder share it.
 *
 * Each channel has one, and one thread that uses it.  Calls go one way: ram, discards -> route ->
 * hand -> precopy -> straight -> this; on the channel of postcopy-preempt ram -> preempt -> straight.
 */
#ifndef SP_RAM_STATE_H
#define SP_RAM_STATE_H

#include "shared/control.h"
#include "shared/status.h"
#include "stream/guests.h"
#include "stream/stream.h"

#define SP_GATHER 128  /* most pages of one pwritev */
#define SP_GUESS 64    /* most pages of one scattered read or one descriptor */

/* Record flags, QEMU migration/ram.c RAM_SAVE_FLAG_* */
enum {
    SP_RAM_ZERO = 0x02,
    SP_RAM_MEM_SIZE = 0x04,
    SP_RAM_PAGE = 0x08,
    SP_RAM_EOS = 0x10,
    SP_RAM_CONTINUE = 0x20,
    SP_RAM_XBZRLE = 0x40,
    SP_RAM_COMPRESSED = 0x100,
    SP_RAM_FLUSH = 0x200
};

typedef struct sp_ram {
    sp_stream *stream;
    sp_control *control;
    sp_word *received, *requested;
    sp_word *written;               /* `continue`: pages that may hold anything but zeros, or NULL */
    uint8_t *pool;                  /* all shards' tmp pages, SP_POOL_SLOTS each */
    uint8_t *alias[SP_MAX_BLOCKS];  /* `continue`: our mapping of each block */
    int block_fd[SP_MAX_BLOCKS];    /* segments */
    sp_guests *guests;              /* to serve requested pages at once, or NULL */
    _Atomic uint32_t *stop;         /* the loop's stop flag, looked at while it waits for a shard */
    int postcopy;                   /* set from LISTENING on */
    int timeout_ms;                 /* -1: wait for the wire */

    int have_block;                 /* CONTINUE is legal */
    uint32_t block;                 /* last named block on this channel, across sections */
    int in_page;                    /* a PAGE header was taken, its payload is not complete */
    uint64_t page;                  /* index of that page, or of the last one */
    size_t got;                     /* payload bytes of it that are at dst */
    uint8_t *dst;                   /* where its payload lands, NULL: not known yet */
    uint64_t slot;                  /* the number of that tmp page (`copy`) */
    int trashed;                    /* dst is `trash`: a second arrival (`continue`) */
    unsigned guess;                 /* pages the next scattered read hopes for */

    uint64_t unrung;                /* bit n: shard n has work and was not told (`continue`) */
    uint64_t unfreed;               /* bit n: shard n only has tmp pages to free (`copy`) */
    sp_desc run;                    /* pages or zeros not handed to the ring yet */
    uint32_t run_shard;

    /* What the two channels say to each other (`continue`; straight.h).  seq_cst: a Dekker pair. */
    _Atomic uint64_t bet;           /* writer: this channel's loop */
    _Atomic uint64_t claim;         /* writer: the preempt channel's loop, in the main channel's */

    /* The channel of postcopy-preempt (preempt.c); set before its loop begins. */
    struct sp_ram *main;            /* the main channel's; NULL: this is the main channel */
    uint64_t counted;               /* bytes of it that are in the totals */
    int own_uffd;                   /* `copy`: of our own mapping */
    uint8_t *own[SP_MAX_BLOCKS];    /* `copy`: that mapping of each block, registered MISSING */
    sp_word *unpunched;             /* `copy`: pages that a discard's punch left in place */

    struct iovec gather[SP_GATHER]; /* precopy pages not written yet; they point into the buffer */
    uint32_t n_gather;
    uint64_t gather_first;

    /* What went wrong, for the message */
    int err;
    uint64_t header;   /* the record's be64 */
    uint64_t at;       /* stream offset of the record */
    uint32_t fill;     /* the zero page's; of SP_BAD_ENCODING the encoding */
    uint32_t encoded;  /* bytes of an encoded page */
    uint8_t *compressed; /* of SP_COMPRESSED: its bytes, in the stream's buffer */
    size_t record;     /* of SP_COMPRESSED: bytes of the record, which is not taken yet */
    uint32_t bad_block; /* of SP_OUTSIDE_BLOCK */
    uint32_t shard;    /* of SP_SHARD_FAILED */
    char name[256];    /* of SP_UNKNOWN_BLOCK */
    uint32_t name_len; /* it may hold a NUL */
    uint64_t mem_size; /* of SP_MEM_SIZE, bytes */

    uint8_t trash[SP_PAGE_BYTES];
} sp_ram;

/* Whole pages of the block's memory at the source, at least one. */
static inline bool sp_is_whole(const sp_block *b, uint64_t start, uint64_t bytes)
{
    uint64_t page = b->source_pages * SP_PAGE_BYTES;
    return start % page == 0 && bytes % page == 0 && bytes &&
           bytes <= b->bytes && start <= b->bytes - bytes;
}

static inline sp_shard *sp_ram_shard(sp_ram *r, uint32_t index)
{
    return &r->control->shards[index];
}

static inline uint8_t *sp_ram_tmp_page(const sp_ram *r, uint32_t shard_index, uint64_t slot)
{
    uint64_t at = (uint64_t)shard_index * SP_POOL_SLOTS + slot % SP_POOL_SLOTS;
    return r->pool + at * SP_PAGE_BYTES;
}

#endif
