/* Making pages visible that stand in the page cache: UFFDIO_CONTINUE on a guest's userfaultfd.
 *
 * Any process that holds the descriptor may do it.  On a mapping registered MISSING | MINOR a page
 * is invisible until it is continued, so the caller names received pages only. */
#ifndef SP_MAP_H
#define SP_MAP_H

#include <stdbool.h>
#include <stdint.h>

/* Where a guest has a block: its userfaultfd for these pages, its address, and the segment. */
typedef struct sp_window {
    int uffd;
    int fd;
    uint64_t base;
} sp_window;

/* Maps `pages` pages of the block from `page` on into the guest and wakes who waits for them.  Holes
 * (zero pages without memory) are skipped, and so is what the guest has mapped already; an address
 * space that is gone ends it.  Returns how many pages were mapped. */
uint64_t sp_map_pages(const sp_window *at, uint64_t page, uint64_t pages);
/* Lets a guest that waits for the first of these pages go on, a hole being filled with zeros; the
 * others are mapped as far as it costs nothing more.  False: the kernel had no memory for it (*err). */
bool sp_map_waited(const sp_window *at, uint64_t page, uint64_t pages, int *err);

#endif
