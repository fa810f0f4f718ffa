#define _GNU_SOURCE
#include "kernel/alias.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define HUGE_BYTES ((size_t)2 << 20)
#define POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14; Debian 12's headers lack it */

enum { NICE = 10 };

uint8_t *sp_alias_map(int fd, size_t bytes)
{
    uint8_t *room = mmap(NULL, bytes + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    size_t before = (HUGE_BYTES - (uintptr_t)room % HUGE_BYTES) % HUGE_BYTES;
    uint8_t *at = mmap(room + before, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    int err = errno;
    size_t mapped = at == MAP_FAILED ? 0 : bytes;
    if (before || mapped == 0)
        munmap(room, mapped ? before : bytes + HUGE_BYTES);
    if (mapped)
        munmap(at + mapped, HUGE_BYTES - before);
    errno = err;
    if (!mapped)
        return NULL;
    madvise(at, bytes, MADV_HUGEPAGE); /* EINVAL: no such pages here, which is no failure */
    return at;
}

int sp_alias_unmap(uint8_t *alias, size_t bytes)
{
    return munmap(alias, bytes) ? -errno : 0;
}

/* In steps of a huge page: between two the thread looks at the switch. */
static int populate_stripe(uint8_t *at, size_t bytes, const _Atomic uint32_t *stop, uint64_t *pages)
{
    for (size_t n; bytes && !atomic_load_explicit(stop, memory_order_relaxed); bytes -= n, at += n) {
        n = bytes < HUGE_BYTES ? bytes : HUGE_BYTES;
        while (madvise(at, n, POPULATE_WRITE)) {
            if (errno != EINTR && errno != EAGAIN)
                return -errno;
            if (atomic_load(stop))
                return 0;
        }
        *pages += n / SP_PAGE_BYTES;
    }
    return 0;
}

int sp_alias_populate(const sp_control *c, const sp_word *received, uint32_t block, uint32_t shard,
                      uint8_t *alias, const _Atomic uint32_t *stop, uint64_t *pages)
{
    const sp_block *b = &c->blocks[block];
    uint64_t all = sp_block_pages(b);
    setpriority(PRIO_PROCESS, 0, NICE); /* of this thread alone (Linux) */
    for (uint64_t page = 0, n; page < all; page += n) {
        n = sp_stripe_rest(c, b, page);
        if (sp_shard_of(c, b, page) != shard || sp_bit_test(received, b->first_bit + page + n - 1))
            continue;
        int rc = populate_stripe(alias + page * SP_PAGE_BYTES, n * SP_PAGE_BYTES, stop, pages);
        if (rc)
            return rc;
        if (atomic_load_explicit(stop, memory_order_relaxed))
            break;
    }
    return 0;
}
