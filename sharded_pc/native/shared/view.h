/* The control segment as plain numbers: for onlookers, and for Python's tests of rings and bitmaps.
 * Views are copies; each number is read by itself, so a view is no consistent cut. */
#ifndef SP_VIEW_H
#define SP_VIEW_H

#include "shared/control.h"

typedef struct sp_control_view {
    uint64_t bytes, n_bits, stripe_pages;
    uint32_t n_shards, owner, postcopy_state, status, n_guests, n_blocks, placement;
    uint32_t ram_section, destination;
    uint64_t destination_start;
    uint32_t guests[SP_MAX_GUESTS];
    char placement_reason[160];
} sp_control_view;

typedef struct sp_totals_view {
    uint64_t transferred, normal, duplicate, requests_sent, discarded, spills, preempt_bytes,
             preempt_pages;
    uint64_t started_ns, setup_ns, stopped_ns, running_ns, ended_ns;
} sp_totals_view;

typedef struct sp_shard_view {
    uint64_t pages, zero_pages, second_pages, copies, mapped, urgent, wakes, discarded;
    uint64_t unpunched, faults, requests, late_faults, lost_samples, latency_ns;
    uint64_t latency[SP_LATENCY_BUCKETS];
    uint64_t queued; /* descriptors in the background ring */
    uint64_t discards_sent, discards_done;
    uint32_t beats, failed, pid, restarts;
} sp_shard_view;

typedef struct sp_block_view {
    char name[256];
    uint64_t bytes, first_bit, first_stripe, source_page; /* bytes */
} sp_block_view;

enum { SP_AT_START = 0, SP_AT_SETUP = 1, SP_AT_STOPPED = 2, SP_AT_RUNNING = 3, SP_AT_ENDED = 4 };

void sp_view_control(sp_control *c, sp_control_view *v);
void sp_view_totals(sp_control *c, sp_totals_view *v);
int sp_view_shard(sp_control *c, uint32_t index, sp_shard_view *v); /* 0 or -ENOENT */
int sp_view_block(sp_control *c, uint32_t index, sp_block_view *v);
/* The shard that owns a page, or -ENOENT if there is no such page. */
int sp_view_shard_of(sp_control *c, uint32_t block, uint64_t page);
/* What the coordinator's Python notes down. */
void sp_note_time(sp_control *c, int what);
void sp_note_shard(sp_control *c, uint32_t index, uint32_t pid);
void sp_note_guest(sp_control *c, uint32_t slot, uint32_t pid); /* 0: it has left */
/* Its worker is dead and reaped: nobody waits for what it held or was about to say. */
void sp_note_death(sp_control *c, uint32_t index);
void sp_note_restart(sp_control *c, uint32_t index);
/* Whether somebody will place this shard's pages: whoever waits for that ends if not. */
void sp_note_failed(sp_control *c, uint32_t index, int failed);
uint32_t sp_shard_beats(const sp_control *c, uint32_t index);
/* Wakes the shard's placement loop, which beats then, if it waits for work. */
void sp_nudge(sp_control *c, uint32_t index);
void sp_note_back_lost(sp_control *c);
void sp_note_ram_section(sp_control *c, uint32_t number);
void sp_note_destination(sp_control *c, uint32_t pid, uint64_t start);
void sp_add_transferred(sp_control *c, uint64_t total);

/* The oldest page request of a shard's guests, waiting at most timeout_ms; 1, or 0: there is none.
 * For a receiver without a return-path loop; it stands in for that loop's ends of the rings. */
int sp_take_request(sp_control *c, uint32_t shard, int timeout_ms, sp_desc *desc);

/* bitmap.h and ring.h as functions. */
int sp_bits_test_at(const sp_word *map, uint64_t bit);
int sp_bits_claim_at(sp_word *map, uint64_t bit);
void sp_bits_set_at(sp_word *map, uint64_t first, uint64_t n);
uint64_t sp_bits_clear_at(sp_word *map, uint64_t first, uint64_t n);
uint64_t sp_bits_count_at(const sp_word *map, uint64_t first, uint64_t n);
uint64_t sp_bits_run_at(const sp_word *map, uint64_t first, uint64_t n);
sp_ring *sp_ring_new(void);
void sp_ring_free(sp_ring *ring);
int sp_ring_push_one(sp_ring *ring, const sp_desc *desc); /* 1, or 0 when full */
int sp_ring_take_one(sp_ring *ring, sp_desc *desc);       /* 1, or 0 when empty */

#endif
