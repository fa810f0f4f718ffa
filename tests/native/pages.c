/* RAM records through a socket: precopy into segments, postcopy into rings, and what is refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "lab/oracle.h"
#include "suites.h"
#include "world.h"

enum { SEED = 5 };

/* What every page must be in the end: version + 1, 0 if it never came. */
typedef struct model {
    uint8_t version[WORLD_BLOCKS][256];
} model;

static void check_pages(world *w, const model *m, int in_image)
{
    uint8_t *page = malloc(SP_PAGE_BYTES);
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        for (uint64_t n = 0; n < WORLD_PAGES[b]; n++) {
            uint8_t v = m->version[b][n];
            CHECK_EQ(sp_bit_test(w->received, world_bit(w, b, n)), v > 0);
            if (in_image)
                memcpy(page, w->image[b] + n * SP_PAGE_BYTES, SP_PAGE_BYTES);
            else
                CHECK_EQ(pread(w->fd[b], page, SP_PAGE_BYTES, (off_t)(n * SP_PAGE_BYTES)),
                         SP_PAGE_BYTES);
            CHECK_EQ(sp_oracle_check(page, SEED, b, n, v ? (uint8_t)(v - 1) : 0), -1);
        }
    free(page);
}

/* Records of a random run of pages; the versions they carry go into the model. */
static size_t random_run(uint8_t *out, model *m, uint64_t *seed, uint32_t *last, int first_wins)
{
    static const char *const NAMES[WORLD_BLOCKS] = {"pc.ram", "pc.bios"};
    uint64_t pages[40];
    uint8_t versions[256];
    uint32_t block = random_below(seed, 8) == 0;
    uint64_t at = random_below(seed, WORLD_PAGES[block]);
    size_t most = (size_t)(WORLD_PAGES[block] - at), n = 1 + random_below(seed, 40);
    n = n < most ? n : most;
    for (size_t i = 0; i < n; i++) {
        pages[i] = at + i;
        versions[at + i] = (uint8_t)(random_below(seed, 4) ? 1 + random_below(seed, 200) : 0);
        uint8_t *known = &m->version[block][at + i];
        if (!first_wins || !*known)
            *known = (uint8_t)(versions[at + i] + 1);
    }
    int go_on = block == *last && random_below(seed, 2);
    *last = block;
    return sp_oracle_records(out, NAMES[block], go_on, SEED, block, pages, n, versions);
}

/* Feeds `bytes` in random pieces; the rings are emptied after each. */
static void feed(world *w, const uint8_t *bytes, size_t size, uint64_t *seed)
{
    while (size) {
        size_t n = random_below(seed, 3) ? 1 + random_below(seed, 9000) : 1 + random_below(seed, 12);
        n = n < size ? n : size;
        world_send(w, bytes, n);
        CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
        world_work(w);
        bytes += n;
        size -= n;
    }
}

static void random_stream(int postcopy)
{
    world *w = world_new(postcopy);
    model m = {0};
    uint64_t seed = 11;
    uint32_t last = WORLD_BLOCKS;
    uint8_t *out = malloc(40 * (9 + 255 + SP_PAGE_BYTES));
    for (int run = 0; run < 120; run++) {
        if (run == 60) /* from here on a guest waits for everything: hints as well */
            sp_bits_set(w->requested, 0, w->control->n_bits);
        feed(w, out, random_run(out, &m, &seed, &last, postcopy), &seed);
        if (run % 20 == 0) {
            world_header(w, SP_RAM_EOS, NULL);
            CHECK_EQ(sp_ram_records(w->ram), SP_EOS);
        }
    }
    check_pages(w, &m, postcopy);
    CHECK(!postcopy || w->control->totals.spills > 0);
    free(out);
    world_free(w);
}

static void check_full_disk(void)
{
    world *w = world_new(0);
    uint8_t page[SP_PAGE_BYTES] = {1};
    w->ram->block_fd[0] = w->ram->block_fd[1] = open("/dev/full", O_WRONLY | O_CLOEXEC);
    world_header(w, 0x2000 | SP_RAM_PAGE, "pc.ram");
    world_send(w, page, sizeof page);
    CHECK_EQ(sp_ram_records(w->ram), SP_SYS);
    CHECK(w->ram->err == ENOSPC || w->ram->err == ESPIPE);
    CHECK(!sp_bit_test(w->received, 2));
    close(w->ram->block_fd[0]);
    world_free(w);
}

void precopy_suite(void)
{
    random_stream(0);
    check_full_disk();
}

static void fill_pool(world *w)
{
    sp_shard *s = &w->control->shards[0];
    atomic_store(&s->slots_taken, SP_POOL_SLOTS);
    uint8_t page[SP_PAGE_BYTES] = {0};
    world_header(w, SP_RAM_PAGE, "pc.ram");
    world_send(w, page, sizeof page);
}

/* No tmp page, no ring slot: the reader waits, and ends when it is told or the worker broke. */
static void check_back_pressure(void)
{
    world *w = world_new(1);
    fill_pool(w);
    atomic_store(w->stop, 1);
    CHECK_EQ(sp_ram_records(w->ram), SP_STOPPED);
    world_free(w);

    w = world_new(1);
    fill_pool(w);
    atomic_store(&w->control->shards[0].failed, EIO);
    CHECK_EQ(sp_ram_records(w->ram), SP_SHARD_FAILED);
    CHECK_EQ(w->ram->shard, 0);
    world_free(w);

    w = world_new(1);
    sp_desc d = {0, 1, 0, 0, SP_DESC_ZERO};
    while (sp_ring_push(&w->control->shards[1].background, &d)) {
    }
    atomic_store(w->stop, 1);
    CHECK_EQ(sp_hand_discard(w->ram, 0, 64, 1), SP_STOPPED);
    CHECK_EQ(sp_hand_drain(w->ram), SP_STOPPED);
    world_free(w);
}

static void check_discards(void)
{
    world *w = world_new(1);
    sp_bits_set(w->received, 0, w->control->n_bits);
    CHECK_EQ(sp_hand_discard(w->ram, 0, 10, 150), SP_OK);
    CHECK_EQ(world_work(w), 3); /* one for each stripe it touches */
    CHECK_EQ(w->discarded, 150);
    CHECK_EQ(sp_bits_count(w->received, 0, WORLD_PAGES[0]), 50);
    CHECK_EQ(sp_bits_run(w->received, 10, 200), 150);
    CHECK_EQ(w->control->shards[0].discards_sent + w->control->shards[1].discards_sent, 3);
    CHECK_EQ(w->control->totals.discarded, 150);
    CHECK_EQ(sp_hand_drain(w->ram), SP_OK);
    atomic_store(&w->control->shards[1].failed, EIO);
    CHECK_EQ(sp_hand_drain(w->ram), SP_SHARD_FAILED);
    CHECK_EQ(w->ram->shard, 1);
    world_free(w);
}

static uint64_t be64(uint64_t v)
{
    return __builtin_bswap64(v);
}

/* A discard of pages 0..3 and 8 in pc.ram: two ranges. */
static size_t discard_message(uint8_t *out)
{
    const uint64_t pairs[4] = {be64(0), be64(0x4000), be64(0x8000), be64(0x1000)};
    const uint8_t head[] = {8, 0, 6, 0, 41, 0, 6, 'p', 'c', '.', 'r', 'a', 'm', 0};
    memcpy(out, head, sizeof head);
    memcpy(out + sizeof head, pairs, sizeof pairs);
    return sizeof head + sizeof pairs;
}

/* Two messages at the very end of the buffer, the second one cut or with one byte changed. */
static size_t ahead(size_t cut, size_t at, uint8_t change)
{
    world *w = world_new(0);
    uint8_t bytes[128];
    size_t one = discard_message(bytes), n = one + discard_message(bytes + one) - cut;
    bytes[one + at] ^= change;
    sp_stream *s = w->stream;
    s->end = sizeof s->buf;
    s->pos = s->end - n;
    memcpy(s->buf + s->pos, bytes, n);
    CHECK_EQ(sp_discards_ahead(w->ram), SP_OK);
    size_t taken = (n - sp_stream_unread(s)) / one;
    CHECK_EQ(sp_stream_unread(s), n - taken * one);
    CHECK_EQ(w->control->totals.discarded, 5 * taken);
    world_work(w);
    CHECK_EQ(w->discarded, 5 * taken);
    world_free(w);
    return taken;
}

static void check_discards_ahead(void)
{
    uint8_t bytes[64];
    size_t one = discard_message(bytes);
    CHECK_EQ(ahead(0, 0, 0), 2);
    for (size_t cut = 1; cut <= one; cut++)
        CHECK_EQ(ahead(cut, 0, 0), 1);
    for (size_t at = 0; at < one; at++) /* no byte of it may be anything */
        CHECK_EQ(ahead(0, at, 0xff), 1);
}

/* A page that a guest waits for stands in both rings, the background one included. */
static void check_hints(void)
{
    world *w = world_new(1);
    sp_bit_claim(w->requested, 5);
    uint8_t *out = malloc(4 * (9 + 255 + SP_PAGE_BYTES)), versions[8] = {0, 0, 0, 0, 1, 1, 1, 1};
    const uint64_t pages[3] = {4, 5, 6};
    world_send(w, out, sp_oracle_records(out, "pc.ram", 0, SEED, 0, pages, 3, versions));
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    sp_ring *urgent = &w->control->shards[0].urgent;
    const sp_desc *d = sp_ring_peek(urgent);
    CHECK(d && d->first_page == 5 && d->pages == 1 && d->kind == SP_DESC_PAGES);
    CHECK_EQ(sp_oracle_check(w->pool + d->slot * SP_PAGE_BYTES, SEED, 0, 5, 1), -1);
    sp_ring_pop(urgent);
    CHECK(sp_ring_empty(urgent));
    world_work(w);
    CHECK_EQ(sp_bits_count(w->received, 4, 3), 3);
    free(out);
    world_free(w);
}

void route_suite(void)
{
    random_stream(1);
    check_back_pressure();
    check_discards();
    check_discards_ahead();
    check_hints();
}

static const struct {
    uint64_t value;
    const char *name;
    sp_status status;
} REFUSED[] = {
    {0, NULL, SP_BAD_FLAGS},
    {SP_RAM_EOS | SP_RAM_CONTINUE, NULL, SP_BAD_FLAGS},
    {SP_RAM_MEM_SIZE | SP_RAM_CONTINUE, NULL, SP_BAD_FLAGS},
    {SP_RAM_PAGE | SP_RAM_ZERO, NULL, SP_BAD_FLAGS},
    {0x400, NULL, SP_BAD_FLAGS},
    {0x01, NULL, SP_UNSUPPORTED},
    {0x80, NULL, SP_UNSUPPORTED},
    {0x0A0, NULL, SP_BAD_FLAGS},
    {SP_RAM_COMPRESSED | SP_RAM_CONTINUE, NULL, SP_NO_BLOCK},
    {SP_RAM_COMPRESSED | 3 * 4096, "pc.bios", SP_OUTSIDE_BLOCK},
    {SP_RAM_MEM_SIZE | 0x4000, NULL, SP_MEM_SIZE},
    {SP_RAM_PAGE | SP_RAM_CONTINUE, NULL, SP_NO_BLOCK},
    {SP_RAM_ZERO | SP_RAM_CONTINUE, NULL, SP_NO_BLOCK},
    {SP_RAM_PAGE, "", SP_EMPTY_NAME},
    {SP_RAM_PAGE, "pc.rom", SP_UNKNOWN_BLOCK},
    {SP_RAM_ZERO, "pc.ramm", SP_UNKNOWN_BLOCK},
    {SP_RAM_PAGE | 200 * 4096, "pc.ram", SP_OUTSIDE_BLOCK},
    {SP_RAM_ZERO | 3 * 4096, "pc.bios", SP_OUTSIDE_BLOCK},
    {SP_RAM_PAGE | 0xfffffffffffff000u, "pc.ram", SP_OUTSIDE_BLOCK},
};

static void check_refused(int postcopy)
{
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++) {
        world *w = world_new(postcopy);
        world_header(w, SP_RAM_EOS, NULL);
        CHECK_EQ(sp_ram_records(w->ram), SP_EOS);
        world_header(w, REFUSED[i].value, REFUSED[i].name);
        CHECK_EQ(sp_ram_records(w->ram), REFUSED[i].status);
        CHECK_EQ(w->ram->header, REFUSED[i].value);
        CHECK_EQ(w->ram->at, 8);
        CHECK_EQ(world_work(w), 0);
        world_free(w);
    }
}

static void check_long_name(int postcopy)
{
    char name[256];
    memset(name, 'x', 255);
    name[255] = 0;
    world *w = world_new(postcopy);
    world_header(w, SP_RAM_PAGE, name);
    CHECK_EQ(sp_ram_records(w->ram), SP_UNKNOWN_BLOCK);
    CHECK_EQ(w->ram->name_len, 255);
    CHECK(memcmp(w->ram->name, name, 255) == 0);
    world_free(w);
}

static void check_fill_and_end(int postcopy)
{
    world *w = world_new(postcopy);
    world_header(w, SP_RAM_ZERO | 0x1000, "pc.bios");
    world_send(w, "\x01", 1);
    CHECK_EQ(sp_ram_records(w->ram), SP_BAD_FILL);
    CHECK_EQ(w->ram->fill, 1);
    CHECK_EQ(sp_bits_count(w->received, 0, w->control->n_bits), 0);
    world_free(w);

    w = world_new(postcopy); /* the wire ends inside a page */
    world_header(w, SP_RAM_ZERO | 0x1000, "pc.bios");
    world_send(w, "", 1);
    world_header(w, SP_RAM_PAGE | SP_RAM_CONTINUE | 0x2000, NULL);
    world_send(w, "half", 4);
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    close(w->wire[0]);
    w->wire[0] = -1;
    CHECK_EQ(sp_ram_records(w->ram), SP_EOF);
    world_work(w);
    CHECK_EQ(sp_bits_count(w->received, 0, w->control->n_bits), 1);
    world_free(w);
}

void records_suite(void)
{
    for (int postcopy = 0; postcopy < 2; postcopy++) {
        check_refused(postcopy);
        check_long_name(postcopy);
        check_fill_and_end(postcopy);
    }
}
