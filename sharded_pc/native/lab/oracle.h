/* What synthetic memory holds, page by page, and a guest that looks at it.
 *
 * Used by the synthetic source, the demo, the tests and the benchmarks (sharded_pc.testing).  A page
 * has a version: 0 is all zeros, any other gives 512 words that depend on seed, block, page and
 * version, so that a page in the wrong place, an old page and a torn page are all seen.
 */
#ifndef SP_ORACLE_H
#define SP_ORACLE_H

#include <stddef.h>
#include <stdint.h>

#define SP_KEEP 0xffu /* as a version to write: leave the page as it is */

void sp_oracle_fill(uint8_t *dst, uint64_t seed, uint32_t block, uint64_t page, uint8_t version);
/* -1 if the page is right, else the byte offset of its first wrong word. */
int sp_oracle_check(const uint8_t *src, uint64_t seed, uint32_t block, uint64_t page,
                    uint8_t version);

/* Visits pages of a mapped block in the given order: touches, checks against `expected[page]`,
 * then rewrites as version write[page] unless that is SP_KEEP, and notes how long the first touch
 * took (latency_ns may be NULL).  Stops at a wrong page.  Returns how many pages were right. */
size_t sp_guest_visit(uint8_t *base, uint64_t seed, uint32_t block, const uint64_t *pages, size_t n,
                      const uint8_t *expected, const uint8_t *write, uint64_t *latency_ns);

/* Writes RAM records (QEMU's format) for the given pages of a block into dst, whose room is at
 * least n * (8 + 1 + 255 + 4096); the first names the block unless `go_on`.  Returns the bytes. */
size_t sp_oracle_records(uint8_t *dst, const char *name, int go_on, uint64_t seed, uint32_t block,
                         const uint64_t *pages, size_t n, const uint8_t *versions);

#endif
