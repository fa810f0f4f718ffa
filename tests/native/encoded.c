/* Encoded pages: xbzrle is patched here, compressed ones are handed out and come back. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "stream/xbzrle.h"
#include "suites.h"
#include "world.h"

/* Exactly as long as it says, so that the sanitizer sees a byte too far. */
static bool patch(uint8_t *page, const char *encoded, size_t n)
{
    uint8_t *copy = malloc(n ? n : 1);
    memcpy(copy, encoded, n);
    bool good = sp_xbzrle_patch(page, copy, n);
    free(copy);
    return good;
}

static void check_patch(void)
{
    uint8_t *page = calloc(1, SP_PAGE_BYTES);
    CHECK(patch(page, "", 0));
    CHECK(patch(page, "\0\1a\x80\x01\2bc", 8));
    CHECK(page[0] == 'a' && page[129] == 'b' && page[130] == 'c' && page[1] == 0 && page[128] == 0);
    CHECK(patch(page, "\xfe\x1f\2yz", 5)); /* the last two bytes */
    CHECK(page[4094] == 'y' && page[4095] == 'z');
    CHECK(!patch(page, "\xff\x1f\2yz", 5));
    CHECK(!patch(page, "\xff\x7f\xff\x7fx", 5));
    for (size_t n = 1; n < 8; n++)
        CHECK(patch(page, "\0\1a\x80\x01\2bc", n) == (n == 3));
    free(page);
}

static void check_refused(void)
{
    world *w = world_new(1);
    world_header(w, SP_RAM_XBZRLE, "pc.ram");
    CHECK_EQ(sp_ram_records(w->ram), SP_NOT_IN_POSTCOPY);
    world_renew(w, 0);
    world_header(w, SP_RAM_XBZRLE | 0x1000, "pc.ram");
    world_send(w, "\2", 1);
    CHECK_EQ(sp_ram_records(w->ram), SP_BAD_ENCODING);
    world_renew(w, 0);
    world_header(w, SP_RAM_XBZRLE | 0x1000, "pc.ram");
    world_send(w, "\1\x10\1", 3);
    CHECK_EQ(sp_ram_records(w->ram), SP_BAD_LENGTH);
    CHECK_EQ(w->ram->encoded, 0x1001);
    world_renew(w, 0);
    world_header(w, SP_RAM_XBZRLE | 0x1000, "pc.ram");
    world_send(w, "\1\0\2\1\0", 5);
    CHECK_EQ(sp_ram_records(w->ram), SP_BAD_ENCODED);
    CHECK_EQ(sp_bits_count(w->received, 0, w->control->n_bits), 0);
    world_free(w);
}

static void check_inflated(int postcopy)
{
    uint8_t page[SP_PAGE_BYTES], there[SP_PAGE_BYTES];
    world *w = world_new(postcopy);
    memset(page, 'p', sizeof page);
    world_header(w, SP_RAM_COMPRESSED | 0x3000, "pc.ram");
    world_send(w, "\0\0\0\3ab", 6);
    CHECK_EQ(sp_ram_records(w->ram), SP_AGAIN);
    world_send(w, "c", 1);
    CHECK_EQ(sp_ram_records(w->ram), SP_COMPRESSED);
    CHECK(w->ram->encoded == 3 && memcmp(w->ram->compressed, "abc", 3) == 0);
    CHECK_EQ(sp_ram_inflated(w->ram, page), SP_OK);
    world_header(w, SP_RAM_ZERO | SP_RAM_CONTINUE | 0x4000, NULL);
    world_send(w, "", 1);
    world_header(w, SP_RAM_EOS, NULL);
    CHECK_EQ(sp_ram_records(w->ram), SP_EOS);
    world_work(w);
    CHECK_EQ(sp_bits_count(w->received, 0, w->control->n_bits), 2);
    CHECK_EQ(w->control->totals.normal, 1);
    CHECK_EQ(pread(w->fd[0], there, sizeof there, 0x3000), (ssize_t)sizeof there);
    CHECK(memcmp(postcopy ? w->image[0] + 0x3000 : there, page, sizeof page) == 0);
    world_free(w);
}

void encoded_suite(void)
{
    check_patch();
    check_refused();
    check_inflated(0);
    check_inflated(1);
}
