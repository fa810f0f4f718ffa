/* A guest with a disk: a multiboot kernel which writes pages to virtio-blk, reads blocks into other pages,
 * and knows what must stand in every word it looks at.
 *
 * Prints as guest_image.py's guest does: S, F when memory and disk are filled, a dot now and then, and
 * "Eaaaaaaaa:vvvvvvvv " for each wrong word.  It leaves the disk alone from F on until a key is pressed;
 * then it prints K, and B for each 64 requests.
 */
#include "multiboot.h"

enum { FIRST = 4 << 20, MOST = 65536, QUEUE = 128, BLOCKS = 256, WORDS = PAGE / 4, USED = 2 * PAGE };
enum { READ = 0, WRITE = 1, SECTORS = PAGE / 512 };

typedef struct desc {
    u32 low, high, len;
    u16 flags, next;
} desc;

typedef struct common { /* virtio_pci_common_cfg */
    u32 device_select, device, driver_select, driver;
    u16 config_vector, queues;
    u8 status, generation;
    u16 queue, size, vector, enable, notify_off;
    u32 desc, desc_high, avail, avail_high, used, used_high;
} common;

static u8 ring[4 * PAGE] __attribute__((aligned(PAGE)));
static u32 in_memory[MOST], on_disk[BLOCKS]; /* seed of what stands there */
static u32 request[4] __attribute__((aligned(16)));
static volatile u8 answer;
static u32 n_pages, seeds;
static volatile u16 *notify;

static volatile u32 *page_at(u32 page)
{
    return (volatile u32 *)(FIRST + page * PAGE);
}

static void use(u32 page)
{
    in_memory[page] = ++seeds * 2654435761u;
    for (u32 i = 0; i < WORDS; i += 64)
        page_at(page)[i] = in_memory[page] + i;
}

static void check(u32 page)
{
    for (u32 i = 0; i < WORDS; i += 64) {
        u32 found = page_at(page)[i];
        if (found == in_memory[page] + i)
            continue;
        put('E');
        put_hex((u32)&page_at(page)[i]);
        put(':');
        put_hex(found);
        put(' ');
    }
}

/* Where a capability of virtio's stands (virtio 1.2, 4.1.4): its BAR's address and an offset. */
static u32 capability(u32 slot, u32 type, u32 *more)
{
    for (u32 at = config(slot, 0x34) & 0xfc; at; at = config(slot, at) >> 8 & 0xfc) {
        u32 head = config(slot, at);
        if ((head & 0xff) != 9 || head >> 24 != type)
            continue;
        u32 bar = config(slot, at + 4) & 0xff;
        *more = config(slot, at + 16);
        return (config(slot, 0x10 + bar * 4) & ~15u) + config(slot, at + 8);
    }
    put('!');
    return 0;
}

static void find_disk(void)
{
    u32 slot, multiplier, none;
    if (!find_device(0x10421af4, &slot))
        put('!'); /* nothing to write to */
    volatile common *c = (volatile common *)capability(slot, 1, &none);
    u32 notify_at = capability(slot, 2, &multiplier);
    c->status = 0;
    while (c->status)
        ;
    c->status = 3; /* acknowledge, driver */
    for (u32 half = 0; half < 2; half++) {
        c->driver_select = half;
        c->driver = half; /* VIRTIO_F_VERSION_1 */
    }
    c->status = 11; /* features ok */
    c->queue = 0;
    c->size = QUEUE;
    c->desc = (u32)ring;
    c->avail = (u32)ring + QUEUE * 16;
    c->used = (u32)ring + USED;
    c->enable = 1;
    notify = (volatile u16 *)(notify_at + c->notify_off * multiplier);
    c->status = 15; /* driver ok */
    if (c->status != 15)
        put('!');
}

/* One request, waited for. */
static void move(u32 what, u32 page, u32 block)
{
    desc *d = (desc *)ring;
    volatile u16 *avail = (volatile u16 *)(ring + QUEUE * 16);
    volatile u16 *used = (volatile u16 *)(ring + USED);
    request[0] = what;
    request[2] = block * SECTORS;
    answer = 0xff;
    d[0] = (desc){(u32)request, 0, 16, 1, 1};
    d[1] = (desc){FIRST + page * PAGE, 0, PAGE, (u16)(what == READ ? 3 : 1), 2};
    d[2] = (desc){(u32)&answer, 0, 1, 2, 0};
    avail[2 + avail[1] % QUEUE] = 0;
    __sync_synchronize();
    avail[1]++;
    __sync_synchronize();
    *notify = 0;
    while (used[1] != avail[1])
        ;
    if (answer)
        put('!');
    if (what == WRITE)
        on_disk[block] = in_memory[page];
    else
        in_memory[page] = on_disk[block];
}

static void use_disk(void)
{
    for (u32 i = 0; i < 32; i++) {
        u32 page = below(n_pages);
        move(READ, page, below(BLOCKS));
        check(page);
        page = below(n_pages);
        check(page);
        move(WRITE, page, below(BLOCKS));
    }
    put('B');
}

void run(u32 magic, const u32 *info)
{
    int pressed = 0;
    (void)magic;
    put('S');
    n_pages = info[2] / 4 - (FIRST - (1 << 20)) / PAGE - 256; /* mem_upper, KiB; not the last MiB */
    n_pages = n_pages < MOST ? n_pages : MOST;
    find_disk();
    for (u32 page = 0; page < n_pages; page++)
        use(page);
    for (u32 block = 0; block < BLOCKS; block++)
        move(WRITE, below(n_pages), block);
    put('F');
    for (u32 turn = 1;; turn++) {
        for (int i = 0; i < 64; i++) {
            u32 page = below(n_pages);
            check(page);
            if (i % 4 == 0)
                use(page);
        }
        if (!pressed && in8(0x64) & 1) {
            pressed = 1;
            put('K');
        }
        if (pressed)
            use_disk();
        if (turn % 64 == 0)
            put('.');
    }
}
