/* `continue`: random streams through a socket straight into the segments.  What is not received may
 * hold anything; what is received holds exactly what was sent, and in postcopy never changes but by
 * the guest, which writes to it and drops pages (a balloon) whenever it likes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "lab/oracle.h"
#include "suites.h"
#include "world.h"

enum { SEED = 5, MOST_RUN = 100, RECORD = 9 + 255 + SP_PAGE_BYTES };
static const char *const NAMES[WORLD_BLOCKS] = {"pc.ram", "pc.bios"};

/* What counts of what was sent: version + 1, 0 if nothing does; and received pages as last seen. */
typedef struct model {
    uint8_t version[WORLD_BLOCKS][256];
    uint8_t held[WORLD_BLOCKS][256];
    uint8_t dropped[WORLD_BLOCKS][256]; /* by the guest, which has not written there since */
    uint8_t *seen[WORLD_BLOCKS];
    uint32_t last_block;
    uint64_t random;
    uint8_t *out;
} model;

static model *model_new(uint64_t seed)
{
    model *m = calloc(1, sizeof *m);
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        m->seen[b] = malloc(WORLD_PAGES[b] * SP_PAGE_BYTES);
    m->out = malloc(MOST_RUN * RECORD);
    m->last_block = WORLD_BLOCKS;
    m->random = seed;
    return m;
}

static void model_free(model *m)
{
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        free(m->seen[b]);
    free(m->out);
    free(m);
}

static uint8_t *page_of(const world *w, uint32_t b, uint64_t n)
{
    return w->ram->alias[b] + n * SP_PAGE_BYTES;
}

/* Postcopy, after any chunk: a received page is the first one sent since its discard. */
static void check_received(const world *w, model *m)
{
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        for (uint64_t n = 0; n < WORLD_PAGES[b]; n++) {
            uint8_t *seen = m->seen[b] + n * SP_PAGE_BYTES, *page = page_of(w, b, n);
            int here = sp_bit_test(w->received, world_bit(w, b, n));
            CHECK(here || !m->held[b][n]); /* it stays */
            if (!here || m->dropped[b][n])
                continue;
            if (m->held[b][n]) {
                CHECK_EQ(memcmp(seen, page, SP_PAGE_BYTES), 0);
                continue;
            }
            CHECK(m->version[b][n] > 0);
            CHECK_EQ(sp_oracle_check(page, SEED, b, n, (uint8_t)(m->version[b][n] - 1)), -1);
            memcpy(seen, page, SP_PAGE_BYTES);
            m->held[b][n] = 1;
        }
}

/* After whole records: exactly what was sent is received, and nothing stands outside. */
static void check_exactly(const world *w, const model *m)
{
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++) {
        struct stat st;
        CHECK(fstat(w->fd[b], &st) == 0 && st.st_size == (off_t)(WORLD_PAGES[b] * SP_PAGE_BYTES));
        for (uint64_t n = 0; n < WORLD_PAGES[b]; n++) {
            uint8_t v = m->version[b][n];
            CHECK_EQ(sp_bit_test(w->received, world_bit(w, b, n)), v > 0);
            if (v && !m->held[b][n] && !m->dropped[b][n])
                CHECK_EQ(sp_oracle_check(page_of(w, b, n), SEED, b, n, (uint8_t)(v - 1)), -1);
        }
    }
}

/* What the guest does between two chunks: it drops pages, wherever the stream is, and writes to
 * those that it can see. */
static void guest_acts(world *w, model *m)
{
    for (uint64_t n = random_below(&m->random, 4); n; n--) {
        uint32_t b = random_below(&m->random, 8) == 0;
        uint64_t page = random_below(&m->random, WORLD_PAGES[b]);
        if (random_below(&m->random, 2)) {
            CHECK_EQ(fallocate(w->fd[b], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               (off_t)(page * SP_PAGE_BYTES), SP_PAGE_BYTES), 0);
            m->dropped[b][page] = 1;
        } else if (sp_bit_test(w->received, world_bit(w, b, page))) {
            uint8_t *seen = m->seen[b] + page * SP_PAGE_BYTES;
            memset(seen, (int)random_below(&m->random, 256), SP_PAGE_BYTES);
            memcpy(page_of(w, b, page), seen, SP_PAGE_BYTES);
            m->dropped[b][page] = 0;
            m->held[b][page] = 1;
        }
    }
}

/* As the worker: every page that it is told of is received.  Returns how many pages. */
static uint64_t work(world *w)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < WORLD_SHARDS; i++) {
        sp_ring *ring = &w->control->shards[i].background;
        for (const sp_desc *d; (d = sp_ring_peek(ring)); sp_ring_pop(ring)) {
            const sp_block *b = &w->control->blocks[d->block];
            CHECK(d->kind == SP_DESC_PAGES || d->kind == SP_DESC_ZERO);
            CHECK(d->pages > 0 && d->first_page + d->pages <= sp_block_pages(b));
            CHECK_EQ(sp_shard_of(w->control, b, d->first_page + d->pages - 1), i);
            CHECK_EQ(sp_bits_count(w->received, b->first_bit + d->first_page, d->pages), d->pages);
            pages += d->pages;
        }
        ring = &w->control->shards[i].urgent;
        while (!sp_ring_empty(ring))
            sp_ring_pop(ring);
    }
    return pages;
}

static size_t chunk(uint64_t *random)
{
    switch (random_below(random, 4)) {
    case 0:
        return 1 + random_below(random, 12);
    case 1:
        return 1 + random_below(random, 9000);
    case 2: /* around a record's edge */
        return (1 + random_below(random, 4)) * (8 + SP_PAGE_BYTES) - 4 + random_below(random, 9);
    default:
        return 1 + random_below(random, 90000);
    }
}

static void feed(world *w, model *m, const uint8_t *bytes, size_t size)
{
    while (size) {
        size_t n = chunk(&m->random);
        n = n < size ? n : size;
        world_send(w, bytes, n);
        CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
        uint64_t told = work(w);
        CHECK(w->ram->postcopy || told == 0);
        if (w->ram->postcopy) {
            guest_acts(w, m);
            check_received(w, m);
        }
        bytes += n;
        size -= n;
    }
}

/* A run of neighbours, some left out, some sent twice; zeros among them. */
static void random_run(world *w, model *m)
{
    uint64_t pages[MOST_RUN], *random = &m->random;
    uint8_t versions[256];
    uint32_t block = random_below(random, 8) == 0;
    uint64_t at = random_below(random, WORLD_PAGES[block]), gaps = random_below(random, 3);
    size_t n = 0, most = 1 + random_below(random, MOST_RUN);
    for (; n < most && at < WORLD_PAGES[block]; n++) {
        pages[n] = at;
        if (!gaps || random_below(random, 12))
            at++;
        if (gaps && random_below(random, 12) == 0)
            at += random_below(random, 5);
    }
    int zeros = random_below(random, 3) == 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t *known = &m->version[block][pages[i]];
        int data = random_below(random, zeros ? 2 : 20) > 0;
        versions[pages[i]] = data ? (uint8_t)(1 + random_below(random, 200)) : 0;
        if (i && pages[i] == pages[i - 1]) /* repeats within a run carry one version */
            versions[pages[i]] = (uint8_t)(*known - 1);
        else if (!w->ram->postcopy || !*known)
            *known = (uint8_t)(versions[pages[i]] + 1);
    }
    if (w->ram->postcopy) /* whatever comes again is another version: it must not be seen */
        for (size_t i = 0; i < n; i++)
            if (m->held[block][pages[i]])
                versions[pages[i]] = (uint8_t)random_below(random, 201);
    int go_on = block == m->last_block && random_below(random, 2);
    m->last_block = block;
    size_t size = sp_oracle_records(m->out, NAMES[block], go_on, SEED, block, pages, n, versions);
    feed(w, m, m->out, size);
    check_exactly(w, m);
}

static void end_section(world *w)
{
    world_header(w, SP_RAM_EOS, NULL);
    CHECK_EQ(sp_ram_records(w->ram), SP_EOS);
    work(w);
}

static void random_discards(world *w, model *m)
{
    end_section(w);
    for (uint64_t n = random_below(&m->random, 6); n; n--) {
        uint32_t b = random_below(&m->random, 6) == 0;
        uint64_t first = random_below(&m->random, WORLD_PAGES[b]);
        uint64_t pages = 1 + random_below(&m->random, WORLD_PAGES[b] - first);
        CHECK_EQ(sp_hand_discard(w->ram, b, first, pages), SP_OK);
        memset(m->version[b] + first, 0, pages);
    }
    check_exactly(w, m);
}

static uint64_t random_migration(uint64_t seed)
{
    world *w = world_new(0);
    world_go_straight(w);
    model *m = model_new(seed);
    for (int run = 0; run < 40; run++) {
        random_run(w, m);
        if (random_below(&m->random, 6) == 0)
            random_discards(w, m);
    }
    random_discards(w, m);
    CHECK_EQ(sp_hand_drain(w->ram), SP_OK);
    w->ram->postcopy = 1;
    check_received(w, m);
    for (int run = 0; run < 60; run++) {
        for (uint64_t n = random_below(&m->random, 20); n; n--)
            sp_bit_claim(w->requested, random_below(&m->random, w->control->n_bits));
        random_run(w, m);
        if (random_below(&m->random, 10) == 0)
            end_section(w);
    }
    uint64_t spills = w->control->totals.spills;
    model_free(m);
    world_free(w);
    return spills;
}

/* Zeros only where something was written, all of it, and not a byte beside it. */
static void check_zeros(void)
{
    world *w = world_new(1);
    world_go_straight(w);
    static const uint8_t zeros[SP_PAGE_BYTES];
    memset(w->ram->alias[0], 0xa5, WORLD_PAGES[0] * SP_PAGE_BYTES);
    sp_bits_set(w->written, world_bit(w, 0, 10), 170); /* more than one call's worth */
    sp_bits_clear(w->written, world_bit(w, 0, 100), 3);
    CHECK_EQ(sp_straight_zeros(w->ram, 0, 20, 150), SP_OK);
    for (uint64_t n = 0; n < WORLD_PAGES[0]; n++) {
        const uint8_t *page = page_of(w, 0, n);
        if (n >= 20 && n < 170 && !(n >= 100 && n < 103))
            CHECK_EQ(memcmp(page, zeros, SP_PAGE_BYTES), 0);
        else
            CHECK(page[0] == 0xa5 && memcmp(page, page + 1, SP_PAGE_BYTES - 1) == 0);
    }
    world_free(w);
}

/* A bet that is lost leaves bytes behind, and zeros that come later are zeros. */
static void check_zero_over_lost_bet(int postcopy)
{
    world *w = world_new(postcopy);
    world_go_straight(w);
    uint8_t *out = malloc(4 * RECORD), versions[32] = {[4] = 1, [20] = 1, [21] = 1};
    const uint64_t pages[3] = {4, 20, 21}, five = 5;
    size_t head = sp_oracle_records(out, "pc.ram", 0, SEED, 0, pages, 1, versions);
    world_send(w, out, head);
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN); /* from here on it bets on page 5 */
    world_send(w, out, sp_oracle_records(out, "pc.ram", 1, SEED, 0, pages + 1, 2, versions));
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    CHECK_EQ(w->control->totals.spills, 1);
    CHECK(!sp_bit_test(w->received, 5) && sp_bit_test(w->written, 5));
    CHECK(sp_oracle_check(page_of(w, 0, 5), SEED, 0, 5, 0) != -1); /* garbage indeed */
    world_send(w, out, sp_oracle_records(out, "pc.ram", 1, SEED, 0, &five, 1, versions));
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    CHECK(sp_bit_test(w->received, 5));
    CHECK_EQ(sp_oracle_check(page_of(w, 0, 5), SEED, 0, 5, 0), -1);
    free(out);
    world_free(w);
}

/* Two versions of a page in one buffer: the first one counts, before anybody was told of it too. */
static void check_first_wins(uint8_t first, uint8_t second)
{
    world *w = world_new(1);
    world_go_straight(w);
    uint8_t *out = malloc(2 * RECORD);
    const uint64_t page = 0;
    size_t n = sp_oracle_records(out, "pc.ram", 0, SEED, 0, &page, 1, &first);
    n += sp_oracle_records(out + n, "pc.ram", 1, SEED, 0, &page, 1, &second);
    world_send(w, out, n);
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    CHECK_EQ(sp_oracle_check(page_of(w, 0, 0), SEED, 0, 0, first), -1);
    CHECK_EQ(w->control->shards[0].counters.second_pages, 1);
    free(out);
    world_free(w);
}

/* Precopy that ends without a page: nothing that a bet left there is seen. */
static void check_unsent(void)
{
    world *w = world_new(0);
    world_go_straight(w);
    uint8_t *out = malloc(4 * RECORD), versions[32] = {[4] = 1, [20] = 1, [21] = 1};
    const uint64_t pages[3] = {4, 20, 21};
    world_send(w, out, sp_oracle_records(out, "pc.ram", 0, SEED, 0, pages, 1, versions));
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    world_send(w, out, sp_oracle_records(out, "pc.ram", 1, SEED, 0, pages + 1, 2, versions));
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    CHECK(sp_oracle_check(page_of(w, 0, 5), SEED, 0, 5, 0) != -1);
    CHECK_EQ(sp_straight_unsent(w->ram), SP_OK);
    for (uint64_t n = 0; n < WORLD_PAGES[0]; n++)
        CHECK_EQ(sp_oracle_check(page_of(w, 0, n), SEED, 0, n, n < 32 ? versions[n] : 0), -1);
    free(out);
    world_free(w);
}

/* A reader that went (its connection was lost) left work untold: who waits for it wakes the worker. */
static void check_untold_work(void)
{
    world *w = world_new(1);
    world_go_straight(w);
    sp_shard *s = &w->control->shards[0];
    const sp_desc left = {0, 1, 0, 0, SP_DESC_ZERO};
    CHECK(sp_ring_push(&s->background, &left));
    uint32_t rung = atomic_load(&s->work.rung);
    atomic_store(w->stop, 1);
    CHECK_EQ(sp_hand_drain(w->ram), SP_STOPPED);
    CHECK(atomic_load(&s->work.rung) != rung);
    world_free(w);
}

void straight_suite(void)
{
    uint64_t spills = 0;
    for (uint64_t seed = 1; seed <= 12; seed++)
        spills += random_migration(seed * 0x9E3779B97F4A7C15ULL);
    CHECK(spills > 0);
    check_zeros();
    check_zero_over_lost_bet(0);
    check_zero_over_lost_bet(1);
    check_unsent();
    check_first_wins(1, 2);
    check_first_wins(0, 2);
    check_first_wins(1, 0);
    check_untold_work();
}
