/* What the benchmarks compare the product with, and what they drive it by.
 *
 * The floors are bare loops: one process, no rings, no bitmaps, no second mapping.  The feeders
 * stand in for the coordinator's stream and return path: they hand the product's workers work
 * through the product's own rings and tmp pages, at once and without payload, so that what is
 * measured is the workers.  Nothing here runs in a receiver.
 */
#ifndef SP_FLOOR_H
#define SP_FLOOR_H

#include <stddef.h>

#include "shared/control.h"
#include "stream/guests.h"
#include "shared/status.h"

/* A mapping with holes that this process registered (MISSING) with its own userfaultfd. */
typedef struct sp_floor {
    int uffd;
    uint8_t *base;
    uint64_t pages;
    const uint8_t *pool; /* SP_POOL_SLOTS pages to copy from, in turn */
} sp_floor;

/* Fills every hole, `batch` pages for each UFFDIO_COPY, stripe by stripe in the feeder's order.
 * 0 or -errno; *ns is the time it took. */
int sp_floor_place(const sp_floor *f, uint64_t stripe_pages, uint64_t batch, uint64_t *ns);
/* Receives RAM records of all pages in order, `first_header` bytes before the first and 8 before
 * every other, into the pool and places 64 at once. */
int sp_floor_stream(const sp_floor *f, int sock, size_t first_header, uint64_t *ns);
/* Threads touch `pages` once each, as sp_touch_pages; one handler thread answers with a blocking
 * read and UFFDIO_COPY or, if `zero`, UFFDIO_ZEROPAGE. */
int sp_floor_faults(const sp_floor *f, const uint64_t *pages, size_t n, uint32_t threads, int zero,
                    uint64_t *latency_ns, size_t *wrong, uint64_t *ns);

/* `threads` threads read the first byte of the pages, each every so-many'th of the given order.
 * latency_ns[i] is how long pages[i] took, *wrong counts bytes that are not `expected`, *ns is the
 * time from the first to the last.  0 or -errno. */
int sp_touch_pages(const uint8_t *base, const uint64_t *pages, size_t n, uint32_t threads,
                   uint8_t expected, uint64_t *latency_ns, size_t *wrong, uint64_t *ns);

/* Hands every page of a block to its worker as descriptors of `kind` with at most `batch` pages,
 * round the shards, backwards within a stripe so that workers cannot join two of them, and waits
 * until all is done.  SP_OK, SP_STOPPED, SP_SHARD_FAILED. */
sp_status sp_feed_block(sp_control *c, uint32_t block, uint32_t kind, uint64_t batch,
                        _Atomic uint32_t *stop, uint64_t *ns);
/* Answers every page request at once, until stopped: a source that is no distance away.  `copy`: with
 * a tmp page as it is; `continue`: with what stands in the block. */
typedef struct sp_service {
    sp_guests *guests;
    sp_word *received;
    const uint8_t *pool; /* all shards' tmp pages */
    _Atomic uint32_t *stop;
} sp_service;
sp_status sp_feed_requests(const sp_service *f);

#endif
