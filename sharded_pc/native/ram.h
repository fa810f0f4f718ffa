/* The records of a `ram` section: the C twin of wire/ram.py.
 *
 * Reads be64 (offset | flags) records until EOS and hands pages on.  Before LISTENING a page goes
 * into its RAMBlock's segment by pwritev (precopy.c): no mapping, so a full tmpfs is ENOSPC and not
 * SIGBUS.  From LISTENING on it goes into a tmp page of its shard (`copy`) or into its RAMBlock
 * through an alias mapping (`continue`, straight.c, before LISTENING too), and a descriptor into the
 * shard's ring (route.c).
 */
#ifndef SP_RAM_H
#define SP_RAM_H

#include "control.h"
#include "guests.h"
#include "status.h"
#include "stream.h"

#define SP_GATHER 128  /* most pages of one pwritev */
#define SP_GUESS 64    /* most pages of one scattered read or one descriptor */

/* Record flags, QEMU migration/ram.c RAM_SAVE_FLAG_* */
enum {
    SP_RAM_ZERO = 0x02,
    SP_RAM_MEM_SIZE = 0x04,
    SP_RAM_PAGE = 0x08,
    SP_RAM_EOS = 0x10,
    SP_RAM_CONTINUE = 0x20
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

    struct iovec gather[SP_GATHER]; /* precopy pages not written yet; they point into the buffer */
    uint32_t n_gather;
    uint64_t gather_first;

    /* What went wrong, for the message */
    int err;
    uint64_t header;   /* the record's be64 */
    uint64_t at;       /* stream offset of the record */
    uint32_t fill;
    uint32_t bad_block; /* of SP_OUTSIDE_BLOCK */
    uint32_t shard;    /* of SP_SHARD_FAILED */
    char name[256];    /* of SP_UNKNOWN_BLOCK */
    uint32_t name_len; /* it may hold a NUL */
    uint64_t mem_size; /* of SP_MEM_SIZE, bytes */

    uint8_t trash[SP_PAGE_BYTES];
} sp_ram;

sp_ram *sp_ram_new(sp_stream *s, sp_control *c, sp_word *received, sp_word *requested,
                   uint8_t *pool, _Atomic uint32_t *stop);
void sp_ram_free(sp_ram *r);
/* `continue`: pages go straight into their blocks.  Before the first record; every block needs its
 * alias as well. */
void sp_ram_go_straight(sp_ram *r, sp_word *written);
/* A new section or a new channel: the next record must name its block (QEMU resets at setup). */
void sp_ram_forget_block(sp_ram *r);
/* Reads records until EOS, MEM_SIZE or trouble. */
sp_status sp_ram_records(sp_ram *r);

/* Hands on what is gathered: nothing may lie here while the wire is quiet. */
sp_status sp_ram_flush(sp_ram *r);

/* precopy.c */
sp_status sp_precopy_page(sp_ram *r, const uint8_t *bytes);
sp_status sp_precopy_zero(sp_ram *r, uint64_t page);
sp_status sp_precopy_flush(sp_ram *r);

/* straight.c */
uint8_t *sp_straight_page(sp_ram *r); /* where the current page's payload lands */
/* How many of at most `most` pages from `first` on a read may bet on; they count as written. */
uint64_t sp_straight_bet(sp_ram *r, uint64_t first, uint64_t most);
/* Buffered payload of the current page; `got` grows. */
sp_status sp_straight_store(sp_ram *r, const uint8_t *bytes, size_t n);
/* The current page and those behind it that stand whole in the buffer, as the next bet would have
 * them, written by one call.  *pages of them are taken off the buffer, 0: none. */
sp_status sp_straight_gather(sp_ram *r, uint64_t *pages);
/* Makes pages that are not received read as zeros. */
sp_status sp_straight_zeros(sp_ram *r, uint32_t block, uint64_t page, uint64_t pages);
/* A migration that ends in precopy: pages that never came read as zeros, whatever a bet left there. */
sp_status sp_straight_unsent(sp_ram *r);

/* route.c: payload to its resting place. */
sp_status sp_route_payload(sp_ram *r); /* goes on with the current page's payload */
sp_status sp_route_ahead(sp_ram *r);   /* reads what probably comes next */

/* hand.c: from a run of pages to the ring of its shard. */
/* Adds one page to the run, handing the run on when the page does not belong to it. */
sp_status sp_hand_add(sp_ram *r, uint32_t index, const sp_desc *one);
/* Back-pressure: sleeps until the shard's worker makes `ready` true, and the wire with it. */
sp_status sp_hand_await(sp_ram *r, uint32_t index, bool (*ready)(sp_shard *));
sp_status sp_hand_zero(sp_ram *r, uint64_t page);
sp_status sp_hand_flush(sp_ram *r);
/* The wire is quiet: tells the shards (arg: the sp_ram) what they were not told yet. */
void sp_hand_quiet(void *arg);
/* Hands a discard of whole pages to every shard it touches. */
sp_status sp_hand_discard(sp_ram *r, uint32_t block, uint64_t first_page, uint64_t pages);
/* Checks and discards n ranges, (start, length) in bytes each, in order.  SP_OUTSIDE_BLOCK: *bad is
 * the first one that is not whole pages of the block; those before it are discarded. */
sp_status sp_hand_discards(sp_ram *r, uint32_t block, const uint64_t *ranges, size_t n,
                            size_t *bad);
/* Waits until every shard has emptied its background ring (discards and pages done). */
sp_status sp_hand_drain(sp_ram *r);
/* discards.c: applies the good discard messages that stand whole in the buffer; what follows them
 * stays.  Only where another discard is legal, and not inside a package. */
sp_status sp_discards_ahead(sp_ram *r);

/* Whole pages of the block, at least one. */
static inline bool sp_is_whole(const sp_block *b, uint64_t start, uint64_t bytes)
{
    return start % SP_PAGE_BYTES == 0 && bytes % SP_PAGE_BYTES == 0 && bytes &&
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

/* Takes one record header; a PAGE leaves `in_page` set. */
sp_status sp_ram_header(sp_ram *r);

#endif
