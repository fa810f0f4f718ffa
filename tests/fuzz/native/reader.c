#define _GNU_SOURCE
#include "reader.h"

#include <linux/futex.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

enum { MOST_IDLE_WAITS = 3 };

static world *waiting;
static unsigned idle;

long __real_syscall(long number, long a, long b, long c, long d, long e, long f);
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f);

/* bell.h's: who sleeps has the worker work instead. */
long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    if (number != SYS_futex || !waiting)
        return __real_syscall(number, a, b, c, d, e, f);
    if (b == FUTEX_WAIT) {
        idle = reader_work(waiting) ? 0 : idle + 1;
        CHECK(idle < MOST_IDLE_WAITS); /* it waits for a worker that has nothing to do: for ever */
    }
    return 0;
}

world *reader_new(int postcopy, int straight)
{
    static world *kept[2];
    world *w = kept[straight];
    if (w) {
        world_renew(w, postcopy);
    } else {
        w = kept[straight] = world_new(postcopy);
        if (straight)
            world_go_straight(w);
    }
    waiting = w;
    idle = 0;
    return w;
}

/* `continue`: what the worker is told of is received, whole, and its own. */
static void check_told(const world *w, uint32_t shard, const sp_desc *d)
{
    const sp_block *b = &w->control->blocks[d->block];
    uint64_t last = d->first_page + d->pages - 1;
    CHECK(d->block < WORLD_BLOCKS && d->pages > 0 && last < sp_block_pages(b) && last >= d->first_page);
    CHECK(d->kind == SP_DESC_PAGES || d->kind == SP_DESC_ZERO);
    CHECK_EQ(sp_shard_of(w->control, b, last), shard);
    CHECK_EQ(sp_bits_count(w->received, b->first_bit + d->first_page, d->pages), d->pages);
}

static size_t work_straight(world *w, uint32_t shard)
{
    size_t n = 0;
    sp_ring *ring = &w->control->shards[shard].background;
    for (const sp_desc *d; (d = sp_ring_peek(ring)); sp_ring_pop(ring), n++)
        check_told(w, shard, d);
    return n;
}

size_t reader_work(world *w)
{
    size_t n = w->written ? 0 : world_work(w);
    for (uint32_t i = 0; i < WORLD_SHARDS; i++) {
        n += w->written ? work_straight(w, i) : 0;
        sp_ring *hints = &w->control->shards[i].urgent;
        while (!sp_ring_empty(hints))
            sp_ring_pop(hints);
    }
    return n;
}

static void check_bits(const world *w, const sp_word *map)
{
    for (uint32_t i = 0; i < WORLD_BLOCKS; i++) {
        uint64_t end = w->control->blocks[i].first_bit + WORLD_PAGES[i];
        uint64_t next = i + 1 < WORLD_BLOCKS ? w->control->blocks[i + 1].first_bit : w->control->n_bits;
        CHECK(!sp_bits_any(map, end, next - end));
    }
}

void reader_check(const world *w)
{
    struct stat st;
    check_bits(w, w->received);
    check_bits(w, w->requested);
    if (w->written)
        check_bits(w, w->written);
    for (uint32_t i = 0; i < WORLD_BLOCKS; i++)
        CHECK(fstat(w->fd[i], &st) == 0 && st.st_size == (off_t)(WORLD_PAGES[i] * SP_PAGE_BYTES));
}
