/* RAM records written: for sources and for the stream that resumes a QEMU. */
#ifndef SP_RECORDS_H
#define SP_RECORDS_H

#include <stddef.h>
#include <stdint.h>

/* Room that n pages of a block may need. */
#define SP_RECORDS_ROOM(n) ((size_t)(n) * (9 + 4096) + 264)

/* Writes the be64 of a record and, unless NULL, the block's name; returns the bytes. */
size_t sp_record_header(uint8_t *dst, uint64_t value, const char *name);
/* Writes PAGE (or, for pages of zeros, ZERO) records for `pages` neighbours from `first` on, whose
 * bytes stand at src; the first record names the block.  Returns the bytes. */
size_t sp_block_records(uint8_t *dst, const char *name, const uint8_t *src, uint64_t first,
                        uint64_t pages);

#endif
