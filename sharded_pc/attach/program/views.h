/* What a program has mapped of a segment, by its own account.
 *
 * Each segment is mapped once and whole, where its userfaultfds serve it; what the program maps of it,
 * in whatever parts and how often, are views of that one mapping.  So a part may be a view several
 * times, and goes when the last of them is unmapped.
 */
#ifndef SP_VIEWS_H
#define SP_VIEWS_H

#include <stddef.h>
#include <stdint.h>

typedef struct sp_view {
    uintptr_t from, to; /* addresses */
} sp_view;

typedef struct sp_views {
    sp_view *all;
    size_t n, room;
} sp_views; /* begins as zeros */

/* 0, or -1: no memory. */
int sp_views_add(sp_views *views, uintptr_t from, uintptr_t to);

/* The program unmaps this: of views that are just this, one goes; else all within it go, and what
 * reaches into it is cut.  0, or -1: no memory, then too much is kept. */
int sp_views_remove(sp_views *views, uintptr_t from, uintptr_t to);

/* Does anything of this belong to a view? */
int sp_views_meet(const sp_views *views, uintptr_t from, uintptr_t to);

void sp_views_forget(sp_views *views);

#endif
