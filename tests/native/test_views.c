/* What a program has mapped of a segment by its own account (attach/program/views.c), against one byte
 * for each page that counts how often it is mapped. */
#include "check.h"

#include "../../sharded_pc/attach/program/views.h"

enum { PAGE = 4096, PAGES = 64, BASE = 16 };

static uintptr_t at(uint64_t page)
{
    return (BASE + page) * PAGE;
}

static void test_aliases(void)
{
    sp_views views = {0};
    CHECK_EQ(sp_views_add(&views, at(0), at(8)), 0);
    CHECK_EQ(sp_views_add(&views, at(0), at(8)), 0);
    CHECK_EQ(sp_views_add(&views, at(0), at(32)), 0);
    CHECK_EQ(sp_views_remove(&views, at(0), at(8)), 0);
    CHECK_EQ(views.n, 2);
    CHECK_EQ(sp_views_remove(&views, at(0), at(32)), 0);
    CHECK(sp_views_meet(&views, at(7), at(8)) && !sp_views_meet(&views, at(8), at(64)));
    CHECK_EQ(sp_views_remove(&views, at(0), at(8)), 0);
    CHECK_EQ(views.n, 0);
    sp_views_forget(&views);
}

static void test_parts_of_one(void)
{
    sp_views views = {0};
    uint8_t is[PAGES];
    uint64_t state = 7;
    for (int round = 0; round < 2000; round++) {
        views.n = 0;
        CHECK_EQ(sp_views_add(&views, at(0), at(PAGES)), 0);
        for (int i = 0; i < PAGES; i++)
            is[i] = 1;
        for (int cut = 0; cut < 6; cut++) {
            uint64_t from = random_below(&state, PAGES), to = from + 1 + random_below(&state, 20);
            CHECK_EQ(sp_views_remove(&views, at(from), at(to)), 0);
            for (uint64_t i = from; i < to && i < PAGES; i++)
                is[i] = 0;
            for (uint64_t i = 0; i < PAGES; i++)
                CHECK_EQ(sp_views_meet(&views, at(i), at(i + 1)), is[i]);
        }
    }
    sp_views_forget(&views);
}

static void test_a_stretch_of_several(void)
{
    sp_views views = {0};
    for (uint64_t page = 0; page < PAGES; page += 4)
        CHECK_EQ(sp_views_add(&views, at(page), at(page + 4)), 0);
    CHECK_EQ(sp_views_remove(&views, at(6), at(50)), 0);
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK_EQ(sp_views_meet(&views, at(page), at(page + 1)), page < 6 || page >= 50);
    sp_views_forget(&views);
}

int main(void)
{
    test_aliases();
    test_parts_of_one();
    test_a_stretch_of_several();
    return 0;
}
