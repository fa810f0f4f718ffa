#include "shared/control.h"

#include <errno.h>
#include <string.h>
#include <time.h>

static_assert(sizeof(sp_bell) == 8, "bells are futex words");
static_assert(sizeof(sp_shard) % 64 == 0, "shards start on cache lines");

size_t sp_control_bytes(uint32_t n_shards)
{
    return sizeof(sp_control) + (size_t)n_shards * sizeof(sp_shard);
}

void sp_control_init(sp_control *c, uint32_t n_shards, uint32_t owner)
{
    c->bytes = sp_control_bytes(n_shards);
    c->n_shards = n_shards;
    c->owner = owner;
    c->magic = SP_CONTROL_MAGIC;
}

int sp_control_check(const sp_control *c, size_t bytes)
{
    if (bytes < sizeof *c || c->magic != SP_CONTROL_MAGIC || c->bytes != bytes)
        return -EPROTO;
    if (c->n_shards == 0 || c->n_shards > SP_MAX_SHARDS || sp_control_bytes(c->n_shards) != bytes)
        return -EPROTO;
    return 0;
}

/* Those who waited or wrote are dead. */
void sp_control_take_over(sp_control *c, uint32_t owner)
{
    atomic_store(&c->owner, owner);
    atomic_store(&c->back_lost, 1);
    atomic_store(&c->back_writer, 0);
    atomic_store(&c->requests.waiting, 0);
    atomic_store(&c->n_guests, 0);
    for (uint32_t i = 0; i < SP_MAX_GUESTS; i++)
        atomic_store(&c->guests[i], 0);
    for (uint32_t i = 0; i < c->n_shards; i++) {
        atomic_store(&c->shards[i].work.waiting, 0);
        atomic_store(&c->shards[i].space.waiting, 0);
        atomic_store(&c->shards[i].failed, 0);
    }
}

void sp_rp_take_back(sp_control *c, uint32_t shard)
{
    uint32_t dead = shard + 1;
    atomic_compare_exchange_strong(&c->back_writer, &dead, 0);
}

static bool same_name(const sp_block *b, const uint8_t *name, size_t len)
{
    return strnlen(b->name, sizeof b->name) == len && memcmp(b->name, name, len) == 0;
}

int sp_control_add_block(sp_control *c, uint32_t index, const char *name, uint64_t bytes)
{
    size_t len = strlen(name);
    if (index >= SP_MAX_BLOCKS)
        return -E2BIG;
    if (len == 0 || len >= sizeof c->blocks[0].name || bytes == 0 || bytes % SP_PAGE_BYTES)
        return -EINVAL;
    for (uint32_t i = 0; i < index; i++)
        if (same_name(&c->blocks[i], (const uint8_t *)name, len))
            return -EEXIST;
    memcpy(c->blocks[index].name, name, len + 1);
    c->blocks[index].bytes = bytes;
    c->blocks[index].source_pages = 1;
    return (int)index;
}

int sp_control_set_source_page(sp_control *c, uint32_t index, uint64_t bytes)
{
    bool power = bytes && (bytes & (bytes - 1)) == 0;
    if (!power || bytes < SP_PAGE_BYTES || c->blocks[index].bytes % bytes)
        return -EINVAL;
    c->blocks[index].source_pages = bytes / SP_PAGE_BYTES;
    return 0;
}

void sp_control_set_placement(sp_control *c, uint32_t placement, const char *reason)
{
    c->placement = placement;
    strncpy(c->placement_reason, reason, sizeof c->placement_reason - 1);
}

int sp_control_publish(sp_control *c, uint32_t n_blocks, uint64_t stripe_pages)
{
    if (stripe_pages == 0 || stripe_pages % 64 || n_blocks > SP_MAX_BLOCKS)
        return -EINVAL;
    uint64_t bit = 0, stripe = 0;
    for (uint32_t i = 0; i < n_blocks; i++) {
        sp_block *b = &c->blocks[i];
        uint64_t pages = sp_block_pages(b);
        b->first_bit = bit;
        b->first_stripe = stripe;
        bit += (pages + 63) / 64 * 64;
        stripe += (pages + stripe_pages - 1) / stripe_pages;
    }
    c->stripe_pages = stripe_pages;
    c->n_bits = bit;
    atomic_store(&c->n_blocks, n_blocks);
    return 0;
}

int sp_control_find(const sp_control *c, const uint8_t *name, size_t len)
{
    uint32_t n = atomic_load(&c->n_blocks);
    for (uint32_t i = 0; i < n; i++)
        if (same_name(&c->blocks[i], name, len))
            return (int)i;
    return -ENOENT;
}

uint32_t sp_state_get(sp_control *c)
{
    return atomic_load(&c->postcopy_state);
}

uint32_t sp_state_set(sp_control *c, uint32_t state)
{
    return atomic_exchange(&c->postcopy_state, state);
}

void sp_status_set(sp_control *c, uint32_t status)
{
    atomic_store(&c->status, status);
}

uint64_t sp_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ULL + (uint64_t)ts.tv_nsec;
}

void sp_latency_add(sp_shard *s, uint64_t ns)
{
    uint64_t us = ns / 1000;
    unsigned bucket = us < 2 ? 0 : 63u - (unsigned)__builtin_clzll(us);
    if (bucket >= SP_LATENCY_BUCKETS)
        bucket = SP_LATENCY_BUCKETS - 1;
    sp_count(&s->counters.latency[bucket], 1);
    sp_count(&s->counters.latency_ns, ns);
}

void sp_waiter_note(sp_shard *s, uint64_t bit, uint64_t ns)
{
    sp_waiter *e = &s->waiters[(bit * 0x9E3779B97F4A7C15ULL) >> 54];
    uint64_t expected = 0;
    if (atomic_load(&e->bit) == 0) {
        atomic_store(&e->ns, ns);
        if (atomic_compare_exchange_strong(&e->bit, &expected, bit + 1))
            return;
    }
    sp_count(&s->counters.lost_samples, 1);
}

void sp_waiter_end(sp_shard *s, uint64_t bit, uint64_t now_ns)
{
    sp_waiter *e = &s->waiters[(bit * 0x9E3779B97F4A7C15ULL) >> 54];
    uint64_t ns = atomic_load(&e->ns), mine = bit + 1;
    if (atomic_compare_exchange_strong(&e->bit, &mine, 0))
        sp_latency_add(s, now_ns > ns ? now_ns - ns : 0);
}
