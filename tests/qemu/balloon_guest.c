/* A guest that balloons: a multiboot kernel (`-kernel`) which gives pages to virtio-balloon, takes
 * them back and uses them, for ever, and knows what must stand in every page it uses.
 *
 * Prints as guest_image.py's guest does: S, F when all pages are filled, a dot now and then, and
 * "Eaaaaaaaa:vvvvvvvv " for each wrong word.  Legacy virtio: virtio 1.2, 2.7.
 */
#include "multiboot.h"

/* QEMU's balloon has queues of 128 (hw/virtio/virtio-balloon.c). */
enum { FIRST = 4 << 20, MOST = 65536, QUEUE = 128, BATCH = 32 };

typedef struct ring {
    u8 room[4 * PAGE]; /* descriptors and what is offered; what is used begins a page */
} ring;

static ring rings[2] __attribute__((aligned(PAGE)));
static u8 generation[MOST];
static u32 frames[BATCH];
static u32 n_pages, io;

/* The two words that are looked at of a page. */
static volatile u32 *word(u32 page, int last)
{
    return (volatile u32 *)(FIRST + page * PAGE + (last ? PAGE - 8 : 0));
}

static u32 expected(u32 page, int last)
{
    return (u32)word(page, last) ^ generation[page];
}

static void use(u32 page)
{
    generation[page]++;
    for (int last = 0; last < 2; last++)
        *word(page, last) = expected(page, last);
}

static void check(u32 page)
{
    for (int last = 0; last < 2; last++) {
        u32 found = *word(page, last);
        if (found == expected(page, last))
            continue;
        put('E');
        put_hex((u32)word(page, last));
        put(':');
        put_hex(found);
        put(' ');
    }
}

static void find_balloon(void)
{
    u32 slot;
    if (!find_device(0x10021af4, &slot))
        put('!'); /* nothing to balloon with */
    io = config(slot, 0x10) & ~3u;
    out8((u16)(io + STATUS), 0);
    out8((u16)(io + STATUS), 3); /* acknowledge, driver */
    out32((u16)(io + FEATURES), 0);
    for (u16 q = 0; q < 2; q++) {
        out16((u16)(io + SELECT), q);
        out32((u16)(io + PFN), (u32)&rings[q] / PAGE);
    }
    out8((u16)(io + STATUS), 7); /* driver ok */
}

/* Offers the frames to queue q and waits until the device has taken them. */
static void give(u16 q, u32 n)
{
    volatile u32 *desc = (volatile u32 *)rings[q].room;
    volatile u16 *avail = (volatile u16 *)(rings[q].room + QUEUE * 16);
    u32 used_at = (QUEUE * 16 + 6 + 2 * QUEUE + PAGE - 1) & ~(u32)(PAGE - 1);
    volatile u16 *used = (volatile u16 *)(rings[q].room + used_at);
    desc[0] = (u32)frames;
    desc[1] = 0;
    desc[2] = n * 4;
    desc[3] = 0;
    avail[2 + avail[1] % QUEUE] = 0;
    __sync_synchronize();
    avail[1]++;
    __sync_synchronize();
    out16((u16)(io + NOTIFY), q);
    while (used[1] != avail[1])
        ;
}

static void balloon(void)
{
    u32 n = 0;
    for (; n < BATCH; n++)
        frames[n] = (FIRST + below(n_pages) * PAGE) / PAGE;
    give(0, n); /* inflate: what stands there is nobody's */
    give(1, n); /* deflate: it is ours again, and is used at once */
    for (u32 i = 0; i < n; i++)
        use(frames[i] - FIRST / PAGE);
}

void run(u32 magic, const u32 *info)
{
    (void)magic;
    put('S');
    n_pages = info[2] / 4 - (FIRST - (1 << 20)) / PAGE - 256; /* mem_upper, KiB; not the last MiB */
    n_pages = n_pages < MOST ? n_pages : MOST;
    find_balloon();
    for (u32 page = 0; page < n_pages; page++)
        use(page);
    put('F');
    for (u32 turn = 1;; turn++) {
        balloon();
        for (int i = 0; i < 64; i++) {
            u32 page = below(n_pages);
            check(page);
            if (i % 4 == 0)
                use(page);
        }
        if (turn % 2 == 0)
            put('.');
    }
}
