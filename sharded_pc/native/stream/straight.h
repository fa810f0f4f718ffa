/* Payload straight into its RAMBlock (`continue`). */
#ifndef SP_STRAIGHT_H
#define SP_STRAIGHT_H

#include "stream/state.h"

uint8_t *sp_straight_page(sp_ram *r); /* where the current page's payload lands */
/* How many of at most `most` pages from `first` on are not received; they count as written. */
uint64_t sp_straight_bet(sp_ram *r, uint64_t first, uint64_t most);
/* The same for a read that may bring other pages than these: until sp_straight_retract the loop of
 * the preempt channel keeps off them. */
uint64_t sp_straight_announce(sp_ram *r, uint64_t first, uint64_t most);
void sp_straight_retract(sp_ram *r);
/* The preempt channel's loop: the main channel bets on the page no more when this returns, and does
 * not before sp_straight_unclaim.  False: stopped. */
bool sp_straight_claim(sp_ram *r, uint64_t bit);
void sp_straight_unclaim(sp_ram *r);
/* Buffered payload of the current page; `got` grows. */
sp_status sp_straight_store(sp_ram *r, const uint8_t *bytes, size_t n);
/* The current page and those behind it that stand whole in the buffer, as the next bet would have
 * them, written by one call.  *pages of them are taken off the buffer, 0: none. */
sp_status sp_straight_gather(sp_ram *r, uint64_t *pages);
/* Makes pages that are not received read as zeros. */
sp_status sp_straight_zeros(sp_ram *r, uint32_t block, uint64_t page, uint64_t pages);
/* A migration that ends in precopy: pages that never came read as zeros, whatever a bet left there. */
sp_status sp_straight_unsent(sp_ram *r);

#endif
