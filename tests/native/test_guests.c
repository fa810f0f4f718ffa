/* What the stream's thread does with guests that come and go under it.  The kernel is played by this
 * file: it stands in for uffd.c, so that a guest can change in the middle of a call. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "stream/guests.h"
#include "suites.h"
#include "kernel/uffd.h"
#include "world.h"

enum { FIRST_UFFD = 10, SECOND_UFFD = 20 };

static sp_guests *guests;
static void (*meanwhile)(void);
static unsigned wakes[64];

sp_fill sp_uffd_copy(int uffd, uint64_t dst, uint64_t src, uint64_t len, int wake,
                     sp_fill_result *res)
{
    (void)uffd, (void)dst, (void)src, (void)wake;
    meanwhile();
    *res = (sp_fill_result){.done = len};
    return SP_FILL_DONE;
}

int sp_uffd_wake(int uffd, uint64_t addr, uint64_t len)
{
    (void)addr, (void)len;
    wakes[uffd]++;
    return 0;
}

sp_fill sp_uffd_zeropage(int uffd, uint64_t addr, uint64_t len, int wake, sp_fill_result *res)
{
    return sp_uffd_copy(uffd, addr, 0, len, wake, res);
}

sp_fill sp_uffd_continue(int uffd, uint64_t addr, uint64_t len, sp_fill_result *res)
{
    return sp_uffd_copy(uffd, addr, 0, len, 1, res);
}

static void add(uint32_t slot, int uffd)
{
    const int uffds[WORLD_SHARDS] = {uffd, uffd + 1};
    const uint64_t base[WORLD_BLOCKS] = {(uint64_t)(slot + 1) << 32, (uint64_t)(slot + 1) << 33};
    CHECK_EQ(sp_guests_add(guests, slot, uffds, base), 0);
}

static void nobody_comes(void)
{
}

static void another_comes(void)
{
    add(1, SECOND_UFFD);
}

/* As sp_guests_drop begins, whose end waits for the call that is under way. */
static void another_takes_its_place(void)
{
    atomic_store(&guests->peers[0].active, 0);
    add(1, SECOND_UFFD);
}

/* A guest that may have looked at `received` too early is woken. */
static void check_woken(void (*event)(void), unsigned expected)
{
    world *w = world_new(1);
    static const uint8_t page[SP_PAGE_BYTES];
    guests = sp_guests_new(w->control);
    w->control->placement = SP_PLACE_COPY;
    memset(wakes, 0, sizeof wakes);
    add(0, FIRST_UFFD);
    meanwhile = event;
    CHECK(sp_guests_give(guests, w->received, 0, 3, page));
    CHECK(sp_bit_test(w->received, world_bit(w, 0, 3)));
    CHECK_EQ(wakes[SECOND_UFFD], expected);
    sp_guests_free(guests);
    world_free(w);
}

int main(void)
{
    check_woken(nobody_comes, 0);
    check_woken(another_comes, 1);
    check_woken(another_takes_its_place, 1);
    return 0;
}
