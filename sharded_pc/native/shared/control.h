/* The control segment: everything that coordinator, workers and onlookers share besides pages.
 *
 * One POSIX shared-memory object per receiver, laid out by this header, mapped by the coordinator
 * and by every worker.  Each field names its writer.  Fields without _Atomic are written before
 * the `n_blocks` store that publishes the geometry (release) and never again.
 */
#ifndef SP_CONTROL_H
#define SP_CONTROL_H

#include <stdalign.h>
#include <stddef.h>
#include <stdint.h>

#include "shared/bell.h"
#include "shared/bitmap.h"
#include "shared/multifd.h"
#include "shared/ring.h"

#define SP_CONTROL_MAGIC 0x6374726c73706336ULL /* "ctrlspc6" */
#define SP_PAGE_BYTES 4096u
#define SP_POOL_SLOTS 256u /* tmp pages of a shard: 1 MiB, the most a requested page waits behind */
#define SP_MAX_BLOCKS 250u /* an attaching guest gets one descriptor per block in one message */
#define SP_MAX_SHARDS 64u
#define SP_MAX_GUESTS 8u
#define SP_LATENCY_BUCKETS 24u /* bucket n: [2^n, 2^(n+1)) microseconds, as QEMU 10.1 */

/* How pages become visible to guests: UFFDIO_COPY from tmp pages, or UFFDIO_CONTINUE of pages that
 * were received straight into their RAMBlock.  Zero is no placement. */
enum { SP_PLACE_COPY = 1, SP_PLACE_CONTINUE = 2 };

#define SP_BACK_LOOP 0x10000u

typedef struct sp_block {
    char name[256];        /* NUL-terminated idstr */
    uint64_t bytes;        /* used_length */
    uint64_t first_bit;    /* of this block in the bitmaps, a multiple of 64 */
    uint64_t first_stripe; /* running stripe number of the block's first stripe */
    uint64_t source_pages; /* target pages of one page of the source's memory: 1, or 512 and more if
                            * it is hugetlbfs; the source discards, is asked for and sends these whole */
} sp_block;

/* When a guest's fault on a page was read.  One entry per hash: a collision loses a sample of the
 * latency statistics (`lost_samples`), never a fault.  Writer: fault loop (ns, then bit); whoever makes the page
 * visible clears bit. */
#define SP_WAITERS 1024u
typedef struct sp_waiter {
    _Atomic uint64_t bit; /* bitmap index + 1, 0: free */
    _Atomic uint64_t ns;
} sp_waiter;

/* Writer: the worker (placement loop unless it says fault; the coordinator for requested pages that
 * it makes visible itself).  Relaxed: onlookers want numbers. */
typedef struct sp_counters {
    _Atomic uint64_t pages;         /* placed with data */
    _Atomic uint64_t zero_pages;    /* received as zeros */
    _Atomic uint64_t second_pages;  /* arrived again, nothing done */
    _Atomic uint64_t copies;        /* UFFDIO_COPY calls */
    _Atomic uint64_t mapped;        /* UFFDIO_CONTINUE: pages made visible to guests by ranges */
    _Atomic uint64_t urgent;        /* pages placed ahead of their turn */
    _Atomic uint64_t wakes;         /* UFFDIO_WAKE calls */
    _Atomic uint64_t discarded;     /* pages named by discards */
    _Atomic uint64_t unpunched;     /* of these: still in place after the punch (`copy`) */
    _Atomic uint64_t faults;        /* fault: messages read */
    _Atomic uint64_t requests;      /* fault: pages asked of the source */
    _Atomic uint64_t late_faults;   /* fault: page was there when the message was read */
    _Atomic uint64_t lost_samples;  /* fault: messages that have none below: another thread waited for
                                     * that page already, or for one with the same waiter */
    _Atomic uint64_t latency_ns;    /* sum over the buckets below */
    _Atomic uint64_t latency[SP_LATENCY_BUCKETS];
} sp_counters;

typedef struct sp_shard {
    alignas(64) sp_bell work;  /* rung by the coordinator, the placement loop waits */
    alignas(64) sp_bell space; /* rung by the placement loop, the coordinator waits */
    alignas(64) _Atomic uint64_t slots_freed; /* writer: placement loop, release */
    alignas(64) _Atomic uint64_t slots_taken; /* writer: coordinator */
    _Atomic uint64_t discards_sent;           /* writer: coordinator */
    alignas(64) _Atomic uint64_t discards_done; /* writer: placement loop, release */
    _Atomic uint32_t beats;                   /* writer: placement loop: it goes on */
    _Atomic uint32_t failed;                  /* writer: coordinator: no worker will come; 0 while one does */
    _Atomic uint32_t pid;                     /* writer: coordinator */
    _Atomic uint32_t restarts;                /* writer: coordinator: successors it has started */
    alignas(64) sp_counters counters;
    sp_waiter waiters[SP_WAITERS];
    sp_ring background;              /* coordinator to worker: pages, zeros, discards, in order */
    sp_ring urgent;                  /* coordinator to worker: hints at pages of `background` */
    sp_ring requests[SP_MAX_GUESTS]; /* worker's fault loop of each guest to coordinator */
} sp_shard;

/* Writer: the coordinator; of `normal` and `duplicate` also the loops of multifd's channels.
 * Relaxed. */
typedef struct sp_totals {
    _Atomic uint64_t transferred;   /* bytes taken off the main channel */
    _Atomic uint64_t multifd;       /* bytes taken off channels of multifd; writers: their loops */
    _Atomic uint64_t normal;        /* page records, repeats included */
    _Atomic uint64_t duplicate;     /* zero-page records, QEMU's word for them */
    _Atomic uint64_t requests_sent; /* REQ_PAGES messages */
    _Atomic uint64_t discarded;     /* pages named by discards */
    _Atomic uint64_t spills;        /* scattered reads that guessed wrong */
    _Atomic uint64_t preempt_bytes; /* taken off postcopy-preempt's channels, beside `transferred` */
    _Atomic uint64_t preempt_pages; /* page and zero-page records that came there */
    _Atomic uint64_t started_ns, setup_ns, stopped_ns, running_ns, ended_ns; /* CLOCK_MONOTONIC */
} sp_totals;

typedef struct sp_control {
    uint64_t magic;
    uint64_t bytes;    /* of this segment */
    uint32_t n_shards;
    _Atomic uint32_t owner; /* pid of the coordinator; writer: coordinator, a successor's too */
    _Atomic uint32_t postcopy_state; /* PostcopyState; writer: coordinator, exchange */
    _Atomic uint32_t status;         /* index into state.MigrationStatus; writer: coordinator */
    _Atomic uint32_t n_guests;       /* attached now; writer: coordinator */
    _Atomic uint32_t n_blocks;       /* 0 until the geometry is known; release */
    uint32_t placement;              /* SP_PLACE_* */
    char placement_reason[160];      /* why that one */
    uint64_t stripe_pages;
    uint64_t n_bits;                 /* of each bitmap */
    alignas(64) sp_bell requests;    /* rung by fault loops, the return-path loop waits */
    /* Who writes on the return path now, 0: nobody; a message must not be cut by another.  Writers:
     * the return-path loop (SP_BACK_LOOP) and, if it is free, fault loops (shard + 1); seq_cst. */
    _Atomic uint32_t back_writer;
    /* There is no way back now: what is requested and not received is asked for when there is one
     * again (back/outstanding.h), so nobody needs to queue it.  Writer: coordinator; seq_cst, for it forms
     * a Dekker pair with `requested`. */
    _Atomic uint32_t back_lost;
    /* What a coordinator's successor needs (resume.py).  Writer: coordinator. */
    _Atomic uint32_t ram_section;       /* number of the stream's RAM section + 1, 0: not known */
    _Atomic uint32_t destination;       /* pid of the QEMU whose guest runs here, 0: none */
    _Atomic uint32_t guests[SP_MAX_GUESTS]; /* pids of those attached, by slot, 0: none */
    _Atomic uint64_t destination_start; /* when it began (proc(5), stat, starttime) */
    alignas(64) sp_totals totals;
    alignas(64) sp_bell reached;     /* rung by channels that come to a SYNC or end, the stream waits */
    alignas(64) sp_bell passed;      /* rung by the stream, channels wait */
    _Atomic uint64_t released;       /* SYNCs that channels may pass, SP_SYNC_NEVER: nobody waits, and
                                      * pages are not legal any more.  Writer: coordinator */
    sp_multifd_channel channels[SP_MAX_CHANNELS];
    sp_block blocks[SP_MAX_BLOCKS];
    alignas(64) sp_shard shards[];
} sp_control;

size_t sp_control_bytes(uint32_t n_shards);
/* Lays out a fresh, zeroed segment. */
void sp_control_init(sp_control *c, uint32_t n_shards, uint32_t owner);
/* 0, or -EPROTO if these `bytes` are not a control segment of this version. */
int sp_control_check(const sp_control *c, size_t bytes);
/* A coordinator takes a dead one's segment over; nobody else may be using it. */
void sp_control_take_over(sp_control *c, uint32_t owner);
/* A shard's process is dead: nobody waits for what it was writing on the return path. */
void sp_rp_take_back(sp_control *c, uint32_t shard);
/* Appends a block before sp_control_publish; returns its index or -errno (E2BIG, EINVAL, EEXIST). */
int sp_control_add_block(sp_control *c, uint32_t index, const char *name, uint64_t bytes);
/* Before sp_control_publish: the page size of the source's memory for a block, a power of two; 0 or
 * -EINVAL if the block is not whole pages of it. */
int sp_control_set_source_page(sp_control *c, uint32_t index, uint64_t bytes);
/* Before sp_control_publish: how pages become visible, and why that way. */
void sp_control_set_placement(sp_control *c, uint32_t placement, const char *reason);
/* Sets the stripe size, computes the stripes and makes the geometry visible. */
int sp_control_publish(sp_control *c, uint32_t n_blocks, uint64_t stripe_pages);
/* Index of the named block or -ENOENT. */
int sp_control_find(const sp_control *c, const uint8_t *name, size_t len);

uint32_t sp_state_get(sp_control *c);
uint32_t sp_state_set(sp_control *c, uint32_t state); /* returns the old one */
void sp_status_set(sp_control *c, uint32_t status);
uint64_t sp_now_ns(void);

static inline uint64_t sp_block_pages(const sp_block *b)
{
    return b->bytes / SP_PAGE_BYTES;
}

static inline uint32_t sp_shard_of(const sp_control *c, const sp_block *b, uint64_t page)
{
    return (uint32_t)((b->first_stripe + page / c->stripe_pages) % c->n_shards);
}

/* Pages from `page` to the end of its stripe or block. */
static inline uint64_t sp_stripe_rest(const sp_control *c, const sp_block *b, uint64_t page)
{
    uint64_t rest = c->stripe_pages - page % c->stripe_pages, left = sp_block_pages(b) - page;
    return rest < left ? rest : left;
}

/* Widens a run of pages to whole pages of the source's memory. */
static inline void sp_whole_source_pages(const sp_block *b, uint64_t *first, uint64_t *pages)
{
    uint64_t end = *first + *pages + b->source_pages - 1;
    *first -= *first % b->source_pages;
    *pages = end - end % b->source_pages - *first;
}

/* The last page of that page of the source's memory which `page` is in. */
static inline uint64_t sp_source_last(const sp_block *b, uint64_t page)
{
    return page - page % b->source_pages + b->source_pages - 1;
}

/* Latency samples of a shard (control.c). */
void sp_waiter_note(sp_shard *s, uint64_t bit, uint64_t ns);
void sp_waiter_end(sp_shard *s, uint64_t bit, uint64_t now_ns);
void sp_latency_add(sp_shard *s, uint64_t ns);

static inline void sp_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

#endif
