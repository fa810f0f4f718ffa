/* The channel of postcopy-preempt: pages that were asked for, each made visible as it comes.
 *
 * Its loop runs beside the main channel's on a thread of its own and uses nothing that has one
 * writer: no ring, no tmp page, no run.  What the two share:
 *
 * `received`, counters   set atomically by either
 * pages in their blocks  (`continue`) claim and bet, straight.h
 * `written`              (`copy`) cleared where a page that a punch left is overwritten: a page
 *                        travels on one channel only
 * guests                 a count of who uses the table, guests.h
 */
#ifndef SP_PREEMPT_H
#define SP_PREEMPT_H

#include "stream/state.h"

/* The current block's page r->page, whose bytes stand at `bytes`. */
sp_status sp_preempt_page(sp_ram *r, const uint8_t *bytes);
sp_status sp_preempt_zero(sp_ram *r, uint64_t page);

#endif
