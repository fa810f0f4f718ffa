/* Page bitmaps in shared memory: one bit per page, 64-bit words.
 *
 * A block's first bit is a multiple of 64 and so is a stripe, so a word belongs to one shard.
 * Who may write: `received` the coordinator and multifd's channels before LISTENING, from then on the
 * shard's placement loop, and the coordinator for pages that it makes visible itself; `requested` the
 * shard's fault loops.  All updates are sequentially consistent: the two
 * bitmaps form a Dekker pair (fault loop: set requested, look at received; placement: set received,
 * look at requested), and one of the two always sees the other.
 */
#ifndef SP_BITMAP_H
#define SP_BITMAP_H

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef _Atomic uint64_t sp_word;

static_assert(sizeof(sp_word) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "shared words: lock-free");

/* Bits first..first+n-1 that fall into the word of `first`; *n_here says how many. */
static inline uint64_t sp_word_mask(uint64_t first, uint64_t n, uint64_t *n_here)
{
    uint64_t shift = first % 64, room = 64 - shift;
    *n_here = n < room ? n : room;
    return (*n_here == 64 ? ~0ULL : (1ULL << *n_here) - 1) << shift;
}

static inline bool sp_bit_test(const sp_word *map, uint64_t bit)
{
    return (atomic_load(&map[bit / 64]) >> (bit % 64)) & 1;
}

/* Sets the bit; true if this call was the one that set it. */
static inline bool sp_bit_claim(sp_word *map, uint64_t bit)
{
    uint64_t mask = 1ULL << (bit % 64);
    return !(atomic_fetch_or(&map[bit / 64], mask) & mask);
}

static inline void sp_bits_set(sp_word *map, uint64_t first, uint64_t n)
{
    for (uint64_t here; n; first += here, n -= here) {
        uint64_t mask = sp_word_mask(first, n, &here);
        atomic_fetch_or(&map[first / 64], mask);
    }
}

/* Clears a range; returns how many bits were set in it. */
static inline uint64_t sp_bits_clear(sp_word *map, uint64_t first, uint64_t n)
{
    uint64_t was = 0;
    for (uint64_t here; n; first += here, n -= here) {
        uint64_t mask = sp_word_mask(first, n, &here);
        was += (uint64_t)__builtin_popcountll(atomic_fetch_and(&map[first / 64], ~mask) & mask);
    }
    return was;
}

static inline bool sp_bits_any(const sp_word *map, uint64_t first, uint64_t n)
{
    for (uint64_t here; n; first += here, n -= here) {
        uint64_t mask = sp_word_mask(first, n, &here);
        if (atomic_load(&map[first / 64]) & mask)
            return true;
    }
    return false;
}

static inline uint64_t sp_bits_count(const sp_word *map, uint64_t first, uint64_t n)
{
    uint64_t count = 0;
    for (uint64_t here; n; first += here, n -= here) {
        uint64_t mask = sp_word_mask(first, n, &here);
        count += (uint64_t)__builtin_popcountll(atomic_load(&map[first / 64]) & mask);
    }
    return count;
}

/* How many bits from `first` on (at most n) have the same value as the bit `first`. */
static inline uint64_t sp_bits_run(const sp_word *map, uint64_t first, uint64_t n)
{
    uint64_t run = 0, here;
    bool value = sp_bit_test(map, first);
    while (run < n) {
        uint64_t mask = sp_word_mask(first + run, n - run, &here);
        uint64_t word = atomic_load(&map[(first + run) / 64]);
        uint64_t other = (value ? ~word : word) & mask;
        if (other)
            return run + (uint64_t)__builtin_ctzll(other) - (first + run) % 64;
        run += here;
    }
    return n;
}

#endif
