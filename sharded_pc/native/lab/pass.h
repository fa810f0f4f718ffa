/* RAM records passed over: what `sharded-pc dump` counts of a recording, without looking at pages.
 * The reference is dump/records.py. */
#ifndef SP_PASS_H
#define SP_PASS_H

#include <stddef.h>
#include <stdint.h>

/* Pages of one kind in one block; offsets are bytes. */
typedef struct sp_passed {
    uint64_t pages;
    uint64_t runs; /* stretches of ascending neighbours */
    uint64_t first, last;
} sp_passed;

/* Passes over whole PAGE and ZERO records that continue a block of `block_size` bytes, and adds to
 * `normal` and `zero`.  Stops before anything else, with the bytes passed. */
size_t sp_pass_records(const uint8_t *data, size_t len, uint64_t block_size, sp_passed *normal,
                       sp_passed *zero);

#endif
