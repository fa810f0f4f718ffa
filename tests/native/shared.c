/* Ring, bitmap, bell, control segment, oracle: what lies in shared memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "check.h"
#include "shared/control.h"
#include "lab/oracle.h"
#include "suites.h"
#include "shared/view.h"
#include "world.h"

void ring_suite(void)
{
    sp_ring *ring = sp_ring_new();
    CHECK(ring && sp_ring_empty(ring));
    sp_desc d = {0, 1, 0, 0, SP_DESC_PAGES}, out;
    CHECK_EQ(sp_ring_take_one(ring, &out), 0);
    uint64_t pushed = 0, taken = 0, seed = 1;
    while (taken < 5 * SP_RING_SLOTS) {
        for (uint64_t n = random_below(&seed, 2 * SP_RING_SLOTS); n; n--) {
            d.first_page = pushed;
            int room = pushed - taken < SP_RING_SLOTS;
            CHECK_EQ(sp_ring_push_one(ring, &d), room);
            pushed += (uint64_t)room;
        }
        for (uint64_t n = random_below(&seed, SP_RING_SLOTS); n; n--) {
            int some = pushed > taken;
            CHECK_EQ(sp_ring_take_one(ring, &out), some);
            if (some)
                CHECK_EQ(out.first_page, taken++);
        }
    }
    sp_ring_free(ring);
}

enum { BITS = 64 * 5 };

static void check_bits(const sp_word *map, const uint8_t *model, uint64_t first, uint64_t n)
{
    uint64_t set = 0, run = 0;
    for (uint64_t i = first; i < first + n; i++)
        set += model[i];
    while (run < n && model[first + run] == model[first])
        run++;
    CHECK_EQ(sp_bits_count(map, first, n), set);
    CHECK_EQ(sp_bits_any(map, first, n), set > 0);
    if (n)
        CHECK_EQ(sp_bits_run(map, first, n), run);
}

void bitmap_suite(void)
{
    sp_word *map = calloc(BITS / 64, sizeof *map);
    uint8_t model[BITS] = {0};
    uint64_t seed = 7;
    for (int round = 0; round < 20000; round++) {
        uint64_t first = random_below(&seed, BITS), n = random_below(&seed, BITS - first + 1), was = 0;
        switch (random_below(&seed, 4)) {
        case 0:
            sp_bits_set(map, first, n);
            memset(model + first, 1, n);
            break;
        case 1:
            for (uint64_t i = first; i < first + n; i++)
                was += model[i];
            CHECK_EQ(sp_bits_clear(map, first, n), was);
            memset(model + first, 0, n);
            break;
        case 2:
            CHECK_EQ(sp_bit_claim(map, first), !model[first]);
            model[first] = 1;
            break;
        default:
            CHECK_EQ(sp_bit_test(map, first), model[first]);
        }
        check_bits(map, model, first, n);
    }
    free((void *)map);
}

/* A ring between the look and the sleep is not lost: the wait returns at once. */
void bell_suite(void)
{
    sp_bell bell = {0};
    uint32_t seen = sp_bell_prepare(&bell);
    sp_bell_ring(&bell);
    uint64_t before = sp_now_ns();
    sp_bell_wait(&bell, seen, 3600 * 1000); /* the runner's time limit is shorter */
    CHECK(sp_now_ns() > before);
    CHECK_EQ(bell.waiting, 0);
    seen = sp_bell_prepare(&bell);
    CHECK_EQ(bell.waiting, 1);
    sp_bell_prepare(&bell); /* another waiter, which goes */
    CHECK_EQ(bell.waiting, 2);
    sp_bell_cancel(&bell);
    sp_bell_wait(&bell, seen, 1); /* nobody rings: it times out */
    CHECK_EQ(bell.waiting, 0);
}

static void check_publishing(void)
{
    sp_control *c = new_control(3);
    CHECK_EQ(sp_control_check(c, sp_control_bytes(3) - 1), -EPROTO);
    CHECK_EQ(sp_control_check(c, 64), -EPROTO);
    c->magic++;
    CHECK_EQ(sp_control_check(c, sp_control_bytes(3)), -EPROTO);
    c->magic--;
    char name[257];
    memset(name, 'n', 256);
    name[256] = 0;
    CHECK_EQ(sp_control_add_block(c, 2, name, 4096), -EINVAL);
    CHECK_EQ(sp_control_add_block(c, 2, name + 1, 4096), 2);
    CHECK_EQ(sp_control_add_block(c, 3, name + 1, 4096), -EEXIST);
    CHECK_EQ(sp_control_add_block(c, 3, "", 4096), -EINVAL);
    CHECK_EQ(sp_control_add_block(c, 3, "b", 0), -EINVAL);
    CHECK_EQ(sp_control_add_block(c, 3, "b", 4097), -EINVAL);
    CHECK_EQ(sp_control_add_block(c, SP_MAX_BLOCKS, "b", 4096), -E2BIG);
    CHECK_EQ(sp_control_publish(c, 3, 63), -EINVAL);
    CHECK_EQ(sp_control_publish(c, 3, 0), -EINVAL);
    CHECK_EQ(sp_control_publish(c, SP_MAX_BLOCKS + 1, 64), -EINVAL);
    CHECK_EQ(sp_control_publish(c, 3, 64), 0);
    CHECK_EQ(c->n_bits, 256 + 64 + 64);
    CHECK_EQ(sp_control_find(c, (const uint8_t *)name, 255), 2);
    CHECK_EQ(sp_control_find(c, (const uint8_t *)name, 254), -ENOENT);
    CHECK_EQ(sp_control_find(c, (const uint8_t *)"pc.ram", 7), -ENOENT);
    free(c);
}

static void check_routing(void)
{
    sp_control *c = new_control(3);
    const sp_block *ram = &c->blocks[0], *bios = &c->blocks[1];
    CHECK_EQ(sp_shard_of(c, ram, 63), 0);
    CHECK_EQ(sp_shard_of(c, ram, 64), 1);
    CHECK_EQ(sp_shard_of(c, ram, 199), 0);
    CHECK_EQ(sp_shard_of(c, bios, 0), 1);
    CHECK_EQ(sp_stripe_rest(c, ram, 0), 64);
    CHECK_EQ(sp_stripe_rest(c, ram, 63), 1);
    CHECK_EQ(sp_stripe_rest(c, ram, 192), 8);
    CHECK_EQ(sp_stripe_rest(c, bios, 2), 1);
    CHECK_EQ(sp_view_shard_of(c, 1, 2), 1);
    CHECK_EQ(sp_view_shard_of(c, 1, 3), -ENOENT);
    CHECK_EQ(sp_view_shard_of(c, 2, 0), -ENOENT);
    free(c);
}

/* Every fault that is noted becomes a sample or is counted as lost: because somebody waits for the
 * page already, because another page has its place, because a clock went back. */
static void check_samples(void)
{
    enum { FAULTS = 3000 };
    sp_control *c = new_control(1);
    sp_shard *s = &c->shards[0];
    uint64_t samples = 0;
    sp_waiter_note(s, 0, 1000);
    sp_waiter_note(s, 0, 2000);
    CHECK_EQ(s->counters.lost_samples, 1);
    for (uint64_t bit = 1; bit < FAULTS; bit++)
        sp_waiter_note(s, bit, 1000 * bit);
    CHECK(s->counters.lost_samples > FAULTS - SP_WAITERS);
    for (uint64_t bit = 0; bit < FAULTS; bit++)
        sp_waiter_end(s, bit, 1);
    for (unsigned i = 0; i < SP_LATENCY_BUCKETS; i++)
        samples += s->counters.latency[i];
    CHECK_EQ(samples + s->counters.lost_samples, FAULTS + 1);
    free(c);
}

/* What a worker held when it was killed is taken from it, and from no other. */
static void check_death(void)
{
    sp_control *c = new_control(2);
    sp_bell_prepare(&c->shards[0].work);
    sp_bell_prepare(&c->shards[1].work);
    atomic_store(&c->back_writer, 2);
    sp_note_death(c, 0);
    CHECK(c->shards[0].work.waiting == 0 && c->shards[1].work.waiting == 1);
    CHECK_EQ(c->back_writer, 2);
    CHECK_EQ(c->shards[0].space.rung, 1);
    sp_note_death(c, 1);
    CHECK_EQ(c->back_writer, 0);
    sp_note_restart(c, 1);
    sp_note_failed(c, 1, 1);
    sp_shard_view shard;
    CHECK_EQ(sp_view_shard(c, 1, &shard), 0);
    CHECK(shard.restarts == 1 && shard.failed == 1);
    sp_note_failed(c, 1, 0);
    CHECK_EQ(c->shards[1].failed, 0);
    free(c);
}

void control_suite(void)
{
    check_samples();
    check_death();
    check_publishing();
    check_routing();
    sp_control *c = new_control(2);
    CHECK_EQ(sp_state_set(c, 3), 0);
    CHECK_EQ(sp_state_set(c, 4), 3);
    CHECK_EQ(sp_state_get(c), 4);
    sp_note_shard(c, 1, 77);
    sp_shard_view shard;
    sp_block_view block;
    CHECK_EQ(sp_view_shard(c, 1, &shard), 0);
    CHECK_EQ(shard.pid, 77);
    CHECK_EQ(sp_view_shard(c, 2, &shard), -ENOENT);
    CHECK_EQ(sp_view_block(c, 1, &block), 0);
    CHECK(strcmp(block.name, "pc.bios") == 0 && block.first_bit == 256);
    CHECK_EQ(sp_view_block(c, 2, &block), -ENOENT);
    free(c);
}

void oracle_suite(void)
{
    uint8_t *page = malloc(SP_PAGE_BYTES), *other = malloc(SP_PAGE_BYTES);
    for (uint64_t n = 0; n < 50; n++) {
        sp_oracle_fill(page, 1, 0, n, 1);
        CHECK_EQ(sp_oracle_check(page, 1, 0, n, 1), -1);
        sp_oracle_fill(other, 1, 0, n, 2);
        CHECK_EQ(sp_oracle_check(other, 1, 0, n, 1), 0);
        CHECK(sp_oracle_check(page, 1, 0, n + 1, 1) >= 0);
        CHECK(sp_oracle_check(page, 1, 1, n, 1) >= 0);
        CHECK(sp_oracle_check(page, 2, 0, n, 1) >= 0);
        memcpy(page + 2048, other + 2048, 2048); /* torn */
        CHECK_EQ(sp_oracle_check(page, 1, 0, n, 1), 2048);
    }
    memset(page, 0, SP_PAGE_BYTES);
    CHECK_EQ(sp_oracle_check(page, 1, 0, 9, 0), -1);
    page[4095] = 1;
    CHECK_EQ(sp_oracle_check(page, 1, 0, 9, 0), 4088);
    free(page);
    free(other);
}
