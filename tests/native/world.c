#define _GNU_SOURCE
#include "world.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"

static void *zeroed(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    CHECK(p);
    return memset(p, 0, bytes);
}

sp_control *new_control(uint32_t n_shards)
{
    sp_control *c = zeroed(sp_control_bytes(n_shards));
    sp_control_init(c, n_shards, 1);
    CHECK_EQ(sp_control_check(c, sp_control_bytes(n_shards)), 0);
    CHECK_EQ(sp_control_add_block(c, 0, "pc.ram", WORLD_PAGES[0] * SP_PAGE_BYTES), 0);
    CHECK_EQ(sp_control_add_block(c, 1, "pc.bios", WORLD_PAGES[1] * SP_PAGE_BYTES), 1);
    CHECK_EQ(sp_control_publish(c, WORLD_BLOCKS, WORLD_STRIPE), 0);
    return c;
}

static int new_segment(uint64_t bytes)
{
    int fd = memfd_create("world", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    return fd;
}

static void connect_reader(world *w, int postcopy)
{
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, w->wire), 0);
    w->stream = sp_stream_new(w->wire[1], -1, -1);
    w->ram = sp_ram_new(w->stream, w->control, w->received, w->requested, w->pool, w->stop);
    w->ram->timeout_ms = 0;
    w->ram->postcopy = postcopy;
    for (int i = 0; i < WORLD_BLOCKS; i++)
        w->ram->block_fd[i] = w->fd[i];
}

static void disconnect_reader(world *w)
{
    sp_ram_free(w->ram);
    sp_stream_free(w->stream);
    close(w->wire[0]);
    close(w->wire[1]);
}

world *world_new(int postcopy)
{
    world *w = zeroed(sizeof *w);
    w->control = new_control(WORLD_SHARDS);
    w->received = zeroed(w->control->n_bits / 8);
    w->requested = zeroed(w->control->n_bits / 8);
    w->pool = zeroed(WORLD_SHARDS * SP_POOL_SLOTS * SP_PAGE_BYTES);
    w->stop = zeroed(sizeof *w->stop);
    for (int i = 0; i < WORLD_BLOCKS; i++) {
        w->fd[i] = new_segment(WORLD_PAGES[i] * SP_PAGE_BYTES);
        w->image[i] = zeroed(WORLD_PAGES[i] * SP_PAGE_BYTES);
    }
    connect_reader(w, postcopy);
    return w;
}

void world_renew(world *w, int postcopy)
{
    uint8_t *alias[WORLD_BLOCKS];
    size_t bytes = w->control->n_bits / 8;
    memcpy(alias, w->ram->alias, sizeof alias);
    disconnect_reader(w);
    free(w->control);
    w->control = new_control(WORLD_SHARDS);
    memset((void *)w->received, 0, bytes);
    memset((void *)w->requested, 0, bytes);
    connect_reader(w, postcopy);
    if (w->written) {
        memset((void *)w->written, 0, bytes);
        w->control->placement = SP_PLACE_CONTINUE;
        memcpy(w->ram->alias, alias, sizeof alias);
        sp_ram_go_straight(w->ram, w->written);
    }
}

static size_t block_bytes(int block)
{
    return WORLD_PAGES[block] * SP_PAGE_BYTES;
}

void world_go_straight(world *w)
{
    w->control->placement = SP_PLACE_CONTINUE;
    w->written = zeroed(w->control->n_bits / 8);
    for (int i = 0; i < WORLD_BLOCKS; i++) {
        size_t bytes = block_bytes(i);
        int hidden = MAP_PRIVATE | MAP_ANONYMOUS;
        uint8_t *at = mmap(NULL, bytes + 2 * SP_PAGE_BYTES, PROT_NONE, hidden, -1, 0);
        CHECK(at != MAP_FAILED);
        at += SP_PAGE_BYTES;
        CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, w->fd[i], 0) == at);
        w->ram->alias[i] = at;
    }
    sp_ram_go_straight(w->ram, w->written);
}

void world_free(world *w)
{
    for (int i = 0; i < WORLD_BLOCKS; i++) {
        if (w->ram->alias[i])
            munmap(w->ram->alias[i] - SP_PAGE_BYTES, block_bytes(i) + 2 * SP_PAGE_BYTES);
        close(w->fd[i]);
        free(w->image[i]);
    }
    disconnect_reader(w);
    free((void *)w->stop);
    free(w->pool);
    free((void *)w->written);
    free((void *)w->requested);
    free((void *)w->received);
    free(w->control);
    free(w);
}

void world_send(world *w, const void *bytes, size_t n)
{
    CHECK_EQ(send(w->wire[0], bytes, n, MSG_NOSIGNAL), n);
}

void world_header(world *w, uint64_t value, const char *name)
{
    uint8_t out[8 + 1 + 255];
    size_t n = 8, len = name ? strlen(name) : 0;
    uint64_t be = __builtin_bswap64(value);
    memcpy(out, &be, 8);
    if (name) {
        out[n++] = (uint8_t)len;
        memcpy(out + n, name, len);
    }
    world_send(w, out, n + len);
}

uint64_t world_bit(const world *w, uint32_t block, uint64_t page)
{
    return w->control->blocks[block].first_bit + page;
}

static void place(world *w, uint32_t shard, const sp_desc *d)
{
    const sp_block *b = &w->control->blocks[d->block];
    CHECK(d->pages > 0 && d->first_page + d->pages <= sp_block_pages(b));
    uint64_t bit = world_bit(w, d->block, d->first_page);
    if (d->kind == SP_DESC_DISCARD) {
        sp_bits_clear(w->received, bit, d->pages);
        w->discarded += d->pages;
        return;
    }
    for (uint64_t i = 0; i < d->pages; i++) {
        CHECK_EQ(sp_shard_of(w->control, b, d->first_page + i), shard);
        uint8_t *to = w->image[d->block] + (d->first_page + i) * SP_PAGE_BYTES;
        uint64_t slot = shard * SP_POOL_SLOTS + (d->slot + i) % SP_POOL_SLOTS;
        if (!sp_bit_claim(w->received, bit + i))
            continue; /* the first one wins */
        if (d->kind == SP_DESC_ZERO)
            memset(to, 0, SP_PAGE_BYTES);
        else
            memcpy(to, w->pool + slot * SP_PAGE_BYTES, SP_PAGE_BYTES);
    }
}

size_t world_work(world *w)
{
    size_t n = 0;
    for (uint32_t i = 0; i < WORLD_SHARDS; i++) {
        sp_shard *s = &w->control->shards[i];
        sp_desc d;
        for (const sp_desc *at; (at = sp_ring_peek(&s->background)); n++) {
            d = *at;
            place(w, i, &d);
            if (d.kind == SP_DESC_PAGES) /* whole in the pool, never over its edge */
                CHECK(d.slot % SP_POOL_SLOTS + d.pages <= SP_POOL_SLOTS);
            if (d.kind == SP_DESC_PAGES)
                atomic_store(&s->slots_freed, d.slot + d.pages);
            sp_ring_pop(&s->background);
        }
    }
    return n;
}
