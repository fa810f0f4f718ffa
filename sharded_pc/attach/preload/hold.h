/* What a process may not do to segments while pages are missing. */
#ifndef SP_HOLD_H
#define SP_HOLD_H

#include "../guest/guest.h"

#define SP_PRELOAD "sharded_pc preload" /* who says what is said on stderr */

/* From now on this guest's segments are looked after; before the first of them is mapped. */
void sp_hold_watch(sp_guest *guest);

/* In a child just forked, which has no segments. */
void sp_hold_forget(void);

/* Everything is here: does what was put off, forgets what was held back, and steps aside. */
void sp_hold_end(sp_guest *guest);

/* The segment that this descriptor is of, or NULL. */
sp_segment *sp_guest_segment(sp_guest *guest, int fd);

#endif
