/* The coordinator's own mapping of a RAMBlock, which no userfaultfd knows: what is stored through it
 * is in the page cache at once and in no guest before it is continued there.
 *
 * Populating allocates pages and maps them here, so that receiving into them never faults.  It runs
 * on threads beside the stream's; what is not populated yet is allocated by the kernel's copy. */
#ifndef SP_ALIAS_H
#define SP_ALIAS_H

#include <stddef.h>
#include <stdint.h>

#include "shared/control.h"

/* Maps a segment shared, writable, aligned to 2 MiB, advised huge; NULL with errno. */
uint8_t *sp_alias_map(int fd, size_t bytes);
int sp_alias_unmap(uint8_t *alias, size_t bytes);
/* Populates this shard's stripes of a block, skipping those that have arrived, until done or *stop;
 * *pages says how many are populated.  0, or -errno where memory ran out (what remains is allocated
 * as it arrives).  Lowers the calling thread's priority. */
int sp_alias_populate(const sp_control *c, const sp_word *received, uint32_t block, uint32_t shard,
                      uint8_t *alias, const _Atomic uint32_t *stop, uint64_t *pages);

#endif
