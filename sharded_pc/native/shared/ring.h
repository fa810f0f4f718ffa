/* Single-producer, single-consumer ring of descriptors in shared memory.
 *
 * `head` is written by the producer only, `tail` by the consumer only; both count descriptors since
 * the ring was made and never wrap in practice (2^64).  The producer releases `head` after writing
 * the slots; the consumer acquires it before reading them, and releases `tail` after its last use.
 */
#ifndef SP_RING_H
#define SP_RING_H

#include <assert.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define SP_RING_SLOTS 512u

enum {
    SP_DESC_PAGES = 1,   /* `pages` pages whose bytes stand in the pool from `slot` on */
    SP_DESC_ZERO = 2,    /* `pages` pages of zeros */
    SP_DESC_DISCARD = 3, /* drop `pages` pages */
    SP_DESC_REQUEST = 4  /* worker to coordinator: the guest waits for this page */
};

typedef struct sp_desc {
    uint64_t first_page; /* page index inside the block */
    uint64_t pages;
    uint64_t slot;       /* running number of the first tmp page; its place is slot % SP_POOL_SLOTS */
    uint32_t block;
    uint32_t kind;       /* SP_DESC_* */
} sp_desc;
static_assert(sizeof(sp_desc) == 32, "descriptors are shared between processes");

typedef struct sp_ring {
    alignas(64) _Atomic uint64_t head; /* writer: producer, release */
    alignas(64) _Atomic uint64_t tail; /* writer: consumer, release */
    alignas(64) sp_desc slots[SP_RING_SLOTS];
} sp_ring;

static inline bool sp_ring_push(sp_ring *ring, const sp_desc *desc)
{
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    if (head - atomic_load_explicit(&ring->tail, memory_order_acquire) >= SP_RING_SLOTS)
        return false;
    ring->slots[head % SP_RING_SLOTS] = *desc;
    atomic_store_explicit(&ring->head, head + 1, memory_order_release);
    return true;
}

/* The oldest descriptor, or NULL; it stays in the ring until sp_ring_pop. */
static inline const sp_desc *sp_ring_peek(sp_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    if (tail == atomic_load_explicit(&ring->head, memory_order_acquire))
        return NULL;
    return &ring->slots[tail % SP_RING_SLOTS];
}

static inline void sp_ring_pop(sp_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    atomic_store_explicit(&ring->tail, tail + 1, memory_order_release);
}

static inline bool sp_ring_empty(sp_ring *ring)
{
    return sp_ring_peek(ring) == NULL;
}

#endif
