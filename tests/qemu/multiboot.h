/* What guests without anything under them share: multiboot (`-kernel`), ports, COM1, PCI, chance. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { PAGE = 4096, COM1 = 0x3f8 };
/* Legacy virtio's registers: virtio 1.2, 4.1.4.8. */
enum { FEATURES = 4, PFN = 8, SIZE = 12, SELECT = 14, NOTIFY = 16, STATUS = 18 };

__attribute__((section(".multiboot"), used)) static const u32 header[3] = {
    0x1BADB002, 0, 0u - 0x1BADB002u};

static u32 random_state = 1;

static inline void out8(u16 port, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out16(u16 port, u16 v) { __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out32(u16 port, u32 v) { __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 v;
    __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static inline u32 in32(u16 port)
{
    u32 v;
    __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static void put(char c)
{
    while (!(in8(COM1 + 5) & 0x20))
        ;
    out8(COM1, (u8)c);
}

static void put_hex(u32 v)
{
    for (int shift = 28; shift >= 0; shift -= 4)
        put("0123456789abcdef"[v >> shift & 15]);
}

static u32 below(u32 n)
{
    random_state = random_state * 1664525 + 1013904223;
    return (random_state >> 8) % n;
}

static u32 config(u32 slot, u32 at)
{
    out32(0xcf8, 0x80000000u | slot << 11 | at);
    return in32(0xcfc);
}

/* The device of this vendor and product, switched on; 0: there is none. */
static int find_device(u32 id, u32 *slot)
{
    for (*slot = 0; *slot < 32; ++*slot) {
        if (config(*slot, 0) != id)
            continue;
        config(*slot, 4);
        out32(0xcfc, 7); /* ports, memory, and the device's own access to memory */
        return 1;
    }
    return 0;
}

void run(u32 magic, const u32 *info);

__asm__(".section .text.start\n.globl start\nstart:\n  movl $stack_end, %esp\n  pushl %ebx\n"
        "  pushl %eax\n  call run\n.bss\n.align 16\n.skip 8192\nstack_end:\n.text\n");
