#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../native/kernel/uffd.h"
#include "../../native/kernel/uffd_abi.h"

#define COLLAPSE 25 /* MADV_COLLAPSE, Linux 6.1; Debian 12's headers lack it */

/* Every stripe is a mapping of its own. */
static const char MORE_MAPS[] = ": raise vm.max_map_count (`sysctl`), or make room in memory";

/* Not libc's: the preload library's own madvise() would put it off.  EINVAL is a kernel that does
 * not know the advice. */
static void advise(const sp_segment *segment, int advice)
{
    syscall(SYS_madvise, segment->base, segment->size, advice);
}

static int open_uffds(sp_memory *memory, const sp_offer *offer, sp_trouble *trouble)
{
    uint64_t minor = offer->mode & UFFDIO_REGISTER_MODE_MINOR ? UFFD_FEATURE_MINOR_SHMEM : 0;
    for (memory->shards = 0; memory->shards < offer->shards; memory->shards++) {
        sp_uffd_info info;
        int fd = sp_uffd_open(UFFD_FEATURE_MISSING_SHMEM | minor, memory->user_only_ok, &info);
        if (fd < 0)
            return sp_fail_as(trouble, SP_CAUSE_HOST, "open a userfaultfd%s: %s; `sharded-pc check` "
                              "names the remedy", memory->user_only_ok ? ""
                              : " that serves the kernel's faults too", strerror(-fd));
        memory->uffds[memory->shards] = fd;
    }
    return 0;
}

static int register_segment(const sp_memory *memory, const sp_segment *segment,
                            const sp_offer *offer, sp_trouble *trouble)
{
    uint64_t stripe = segment->first_stripe;
    for (uint64_t at = 0; at < segment->size; stripe++) {
        uint64_t left = segment->size - at;
        uint64_t len = left < offer->stripe_bytes ? left : offer->stripe_bytes;
        uint64_t addr = (uint64_t)(uintptr_t)segment->base + at;
        int rc = sp_uffd_register(memory->uffds[stripe % offer->shards], addr, len, offer->mode,
                                  NULL);
        if (rc < 0)
            return sp_fail_as(trouble, SP_CAUSE_HOST, "register %s at offset %#" PRIx64 ": %s%s",
                              segment->path, at, strerror(-rc), rc == -ENOMEM ? MORE_MAPS : "");
        at += len;
    }
    return 0;
}

static void hold(const sp_memory *memory)
{
    for (unsigned i = 0; i < memory->n_segments; i++) {
        advise(&memory->segments[i], MADV_DONTFORK); /* a child has no userfaultfd */
        if (!(memory->mode & UFFDIO_REGISTER_MODE_MINOR))
            /* Until Linux 6.4 khugepaged fills holes that wait for a page. */
            advise(&memory->segments[i], MADV_NOHUGEPAGE);
    }
}

static int use_ready(sp_memory *memory, const sp_offer *offer, sp_trouble *trouble)
{
    if (offer->shards > memory->ready)
        return sp_fail_as(trouble, SP_CAUSE_HOST, "the receiver has %" PRIu64 " shards, but only %u "
                          "userfaultfds could be opened when this program began; `sharded-pc check` "
                          "names the remedy", offer->shards, memory->ready);
    while (memory->ready > offer->shards)
        close(memory->uffds[--memory->ready]);
    memory->shards = offer->shards;
    memory->ready = 0;
    return 0;
}

int sp_memory_register(sp_memory *memory, const sp_offer *offer, const sp_offered_block **blocks,
                       sp_trouble *trouble)
{
    int ours = !memory->ready; /* to be registered */
    if (ours ? open_uffds(memory, offer, trouble) : use_ready(memory, offer, trouble))
        return -1;
    memory->stripe_bytes = offer->stripe_bytes;
    for (unsigned i = 0; i < memory->n_segments; i++) {
        memory->segments[i].first_stripe = blocks[i]->first_stripe;
        if (ours && register_segment(memory, &memory->segments[i], offer, trouble))
            return -1;
    }
    memory->mode = offer->mode;
    hold(memory);
    return 0;
}

int sp_memory_check_same(const sp_memory *memory, const sp_offer *offer,
                         const sp_offered_block **blocks, sp_trouble *trouble)
{
    int same = memory->stripe_bytes == offer->stripe_bytes && memory->shards == offer->shards;
    for (unsigned i = 0; same && i < memory->n_segments; i++)
        same = memory->segments[i].first_stripe % memory->shards ==
               blocks[i]->first_stripe % memory->shards;
    if (!same)
        return sp_fail_as(trouble, SP_CAUSE_STRANGER,
                          "the receiver deals the memory to other shards than before");
    if (memory->mode != offer->mode)
        return sp_fail_as(trouble, SP_CAUSE_STRANGER, "the receiver wants the memory registered in "
                          "another mode than before: another --placement");
    return 0;
}

void sp_memory_close(sp_memory *memory)
{
    while (memory->ready)
        close(memory->uffds[--memory->ready]);
    while (memory->shards)
        close(memory->uffds[--memory->shards]);
    memory->mode = 0;
}

void sp_memory_let_go(const sp_memory *memory)
{
    for (unsigned i = 0; i < memory->n_segments; i++) {
        const sp_segment *segment = &memory->segments[i];
        if (!segment->base)
            continue;
        if (!segment->dont_fork)
            advise(segment, MADV_DOFORK);
        if (!segment->no_huge) /* QEMU's own clean-up does the same */
            advise(segment, MADV_HUGEPAGE);
    }
}

void sp_memory_collapse(const sp_memory *memory)
{
    for (unsigned i = 0; i < memory->n_segments; i++)
        if (memory->segments[i].base)
            advise(&memory->segments[i], COLLAPSE);
}
