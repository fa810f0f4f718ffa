/* From a run of pages to the ring of its shard. */
#ifndef SP_HAND_H
#define SP_HAND_H

#include "stream/state.h"

/* Hands on what is gathered, in precopy too: nothing may lie here while the wire is quiet. */
sp_status sp_hand_all(sp_ram *r);
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

#endif
