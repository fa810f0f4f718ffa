/* One guest for the process: its userfaultfds are opened when the process begins, its memory is mapped
 * and handed over when the program maps the first piece of it or is sent a descriptor of it.
 *
 * In between it may have changed its root, its user, its namespaces, and filter its system calls.  So
 * from then on only such are made here as a program that maps and is sent descriptors makes itself:
 * mmap, sendmsg, recvmsg, ppoll, fcntl, futex and the like.  userfaultfd's ioctls are left to the
 * receiver's workers, who register the memory before the hand-over is over.
 */
#define _GNU_SOURCE
#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../native/kernel/uffd.h"
#include "../../native/kernel/uffd_abi.h"
#include "../preload/hold.h"
#include "broker.h"
#include "views.h"

enum { EXIT_HOST = 3, MOST_SHARDS = 64 /* control.h */ };

#define HUGE_BYTES ((size_t)2 << 20)
#define ANSWER_NS 60000000000ull /* for a hand-over */

static int open_by_broker(sp_guest *guest, uint64_t deadline, sp_trouble *trouble);
static int map_blocks(sp_guest *guest, const sp_message *geometry, sp_trouble *trouble);
static void let_go(sp_guest *guest);

static const sp_guest_kind KIND = {
    .who = SP_PROGRAM, .open = open_by_broker, .map = map_blocks, .let_go = let_go};

/* Written by the constructor. */
static atomic_int watching;
static dev_t shm; /* where RAM is */

/* Of all that follows.  The guest's thread takes it when everything is here, which may be in the middle
 * of the hand-over. */
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static pid_t owner;
static sp_guest guest;
static atomic_int is_attached; /* the guest has memory */
static sp_views views;
static struct stat wanted; /* what a broker is asked for */

/* Of `broker`, also for the guest's thread, which comes back after its receiver was lost. */
static pthread_mutex_t asking = PTHREAD_MUTEX_INITIALIZER;
static sp_broker broker = {-1};

int sp_program_watches(void)
{
    return atomic_load_explicit(&watching, memory_order_acquire);
}

int sp_program_may_be_ram(int fd, struct stat *st)
{
    return fd >= 0 && fstat(fd, st) == 0 && S_ISREG(st->st_mode) && st->st_dev == shm;
}

void sp_program_lock(void)
{
    int err = errno;
    pthread_mutex_lock(&lock);
    errno = err;
}

void sp_program_unlock(void)
{
    int err = errno;
    pthread_mutex_unlock(&lock);
    errno = err;
}

/* --- how a process begins --- */

static void open_ready(void)
{
    sp_memory *memory = &guest.memory;
    sp_uffd_info info;
    while (memory->ready < MOST_SHARDS) {
        int fd = sp_uffd_open(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM, 0, &info);
        if (fd == -EOPNOTSUPP) /* Linux before 5.14: placement `copy` */
            fd = sp_uffd_open(UFFD_FEATURE_MISSING_SHMEM, 0, &info);
        if (fd < 0)
            return; /* told if they are needed */
        memory->uffds[memory->ready++] = fd;
    }
}

static void begin(void)
{
    memset(&guest, 0, sizeof guest);
    guest.kind = &KIND;
    sp_channel_init(&guest.channel, 0); /* its thread ends with the process */
    owner = getpid();
    open_ready();
}

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
    pthread_mutex_lock(&asking);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&asking);
    pthread_mutex_unlock(&lock);
}

/* The child has not got the memory (MADV_DONTFORK), and the userfaultfds are its parent's. */
static void begin_child(void)
{
    sp_hold_forget();
    sp_channel_close(&guest.channel);
    sp_memory_close(&guest.memory);
    views.n = 0;
    atomic_store(&is_attached, 0);
    sp_broker_fork(&broker);
    begin();
}

static void in_child(void)
{
    lock = (pthread_mutex_t)PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
    asking = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    begin_child();
}

__attribute__((constructor)) static void start(void)
{
    const char *name = getenv("SHARDED_PC_BROKER");
    struct stat st;
    if (!name || stat("/dev/shm", &st))
        return;
    shm = st.st_dev;
    int rc = sp_broker_open(&broker, name);
    if (rc < 0)
        sp_say(SP_PROGRAM, "the process beside this program cannot be reached: %s; it may not map "
                           "RAM of which pages are missing", strerror(-rc));
    begin();
    pthread_atfork(before_fork, after_fork, in_child);
    atomic_store(&watching, 1);
}

/* --- the hand-over --- */

static sp_answer ask(sp_wish wish, const struct stat *st, int *fd, sp_trouble *trouble)
{
    pthread_mutex_lock(&asking);
    sp_answer answer = sp_broker_ask(&broker, wish, st->st_dev, st->st_ino, fd, trouble);
    pthread_mutex_unlock(&asking);
    return answer;
}

static int open_by_broker(sp_guest *g, uint64_t deadline, sp_trouble *trouble)
{
    int fd;
    (void)deadline; /* the broker's own is shorter */
    sp_answer answer = ask(SP_WISH_RECEIVER, &wanted, &fd, trouble);
    if (answer == SP_ANSWER_RECEIVER) {
        sp_channel_use(&g->channel, fd);
        return 0;
    }
    if (fd >= 0)
        close(fd);
    if (answer == SP_ANSWER_ERROR)
        return -1;
    return sp_fail_as(trouble, SP_CAUSE_STRANGER, "there is no receiver of this RAM any more");
}

/* At an address at which huge pages fit. */
static void *place(int fd, size_t size)
{
    uint8_t *room = mmap(NULL, size + HUGE_BYTES, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    size_t skip = -(uintptr_t)room & (HUGE_BYTES - 1);
    if (skip)
        syscall(SYS_munmap, room, skip);
    size_t rest = HUGE_BYTES - skip;
    if (rest)
        syscall(SYS_munmap, room + skip + size, rest);
    return (void *)syscall(SYS_mmap, room + skip, size, PROT_READ | PROT_WRITE,
                           MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
}

static int map_block(sp_segment *segment, const sp_offered_block *block, int right)
{
    char name[256];
    struct stat st;
    if (fstat(right, &st))
        return -errno;
    sp_text_print(name, sizeof name, block->name);
    *segment = (sp_segment){.dev = st.st_dev, .ino = st.st_ino, .size = (uint64_t)st.st_size};
    void *at = asprintf(&segment->path, "block %s", name) < 0 ? MAP_FAILED
                                                              : place(right, (size_t)st.st_size);
    if (at == MAP_FAILED)
        return -ENOMEM;
    segment->base = at;
    return 0;
}

static int map_blocks(sp_guest *g, const sp_message *geometry, sp_trouble *trouble)
{
    unsigned n = geometry->offer.n_blocks;
    if (n != g->channel.n_rights)
        return sp_fail(trouble, "%u descriptors came for %u blocks", g->channel.n_rights, n);
    g->memory.segments = calloc(n, sizeof *g->memory.segments);
    for (unsigned i = 0; i < n; i++) {
        int rc = g->memory.segments ? map_block(&g->memory.segments[i], &geometry->offer.blocks[i],
                                                g->channel.rights[i]) : -ENOMEM;
        g->memory.n_segments += g->memory.segments != NULL;
        if (rc < 0)
            return sp_fail_as(trouble, SP_CAUSE_HOST, "map the receiver's RAM: %s", strerror(-rc));
    }
    return 0;
}

static void unmap_segment(sp_segment *segment)
{
    if (segment->base)
        syscall(SYS_munmap, segment->base, segment->size);
    segment->base = NULL;
}

/* Nothing of a hand-over that failed stays. */
static void undo(void)
{
    sp_memory *memory = &guest.memory;
    sp_memory_close(memory);
    for (unsigned i = 0; i < memory->n_segments; i++) {
        unmap_segment(&memory->segments[i]);
        free(memory->segments[i].path);
    }
    free(memory->segments);
    memory->segments = NULL;
    memory->n_segments = 0;
    open_ready();
}

static int unused(const sp_segment *segment)
{
    uintptr_t from = (uintptr_t)segment->base;
    return !sp_views_meet(&views, from, from + segment->size);
}

/* Everything is here: what is mapped is an ordinary mapping, and goes with its last view. */
static void let_go(sp_guest *g)
{
    sp_hold_end(g);
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < g->memory.n_segments; i++)
        if (is_attached && unused(&g->memory.segments[i]))
            unmap_segment(&g->memory.segments[i]);
    atomic_store(&g->completed, 1); /* before anybody looks for a file again */
    pthread_mutex_unlock(&lock);
}

static sp_segment *segment_of(const struct stat *st)
{
    for (unsigned i = 0; i < guest.memory.n_segments; i++)
        if (guest.memory.segments[i].dev == st->st_dev && guest.memory.segments[i].ino == st->st_ino)
            return &guest.memory.segments[i];
    return NULL;
}

static sp_whose refuse(const char *why)
{
    sp_say(SP_PROGRAM, "RAM of which pages are missing is not mapped: %s", why);
    return SP_WHOSE_NOBODY;
}

static sp_whose attach(const struct stat *st)
{
    sp_trouble trouble;
    wanted = *st;
    if (sp_guest_attach(&guest, sp_clock_ns() + ANSWER_NS, &trouble) || !segment_of(st)) {
        if (guest.memory.n_segments && !segment_of(st))
            sp_fail(&trouble, "the receiver did not offer it");
        undo();
        return refuse(trouble.text);
    }
    atomic_store(&is_attached, 1);
    if (atomic_load(&guest.completed))
        return SP_WHOSE_RECEIVER;
    sp_hold_watch(&guest);
    if (sp_guest_follow(&guest, &trouble) == 0)
        return SP_WHOSE_RECEIVER;
    sp_say(SP_PROGRAM, "attach: %s", trouble.text);
    _exit(EXIT_HOST); /* attached, and nobody would hear the receiver */
}

sp_whose sp_program_find(const struct stat *st)
{
    sp_trouble trouble;
    if (owner != getpid()) /* made by clone(2), not by fork() */
        begin_child();
    if (is_attached && !atomic_load(&guest.completed) && segment_of(st))
        return SP_WHOSE_RECEIVER;
    int fd;
    sp_answer answer = ask(SP_WISH_FILE, st, &fd, &trouble);
    if (fd >= 0)
        close(fd);
    if (answer == SP_ANSWER_ERROR)
        return refuse(trouble.text);
    if (answer != SP_ANSWER_RECEIVER)
        return SP_WHOSE_OTHER;
    if (is_attached && atomic_load(&guest.completed))
        return segment_of(st) ? SP_WHOSE_OTHER : refuse("it is another receiver's than before");
    return is_attached ? refuse("it is another receiver's than what is mapped already") : attach(st);
}

/* --- what the program sees of it --- */

void *sp_program_view(const struct stat *st, size_t len, off_t offset)
{
    const sp_segment *segment = segment_of(st);
    uint64_t at = (uint64_t)offset, size = (len + 4095) & ~(uint64_t)4095;
    if (len == 0 || offset < 0 || at % 4096 || at > segment->size || size > segment->size - at) {
        sp_say(SP_PROGRAM, "%s: %#zx bytes at offset %#jx are not all in it", segment->path, len,
               (intmax_t)offset);
        errno = EINVAL;
        return NULL;
    }
    uintptr_t from = (uintptr_t)segment->base + at;
    if (sp_views_add(&views, from, from + size) == 0)
        return (void *)from;
    errno = ENOMEM;
    return NULL;
}

int sp_program_has_memory(void)
{
    return atomic_load(&is_attached);
}

int sp_program_meets(const void *addr, size_t len)
{
    uintptr_t from = (uintptr_t)addr;
    for (unsigned i = 0; i < guest.memory.n_segments; i++) {
        uintptr_t base = (uintptr_t)guest.memory.segments[i].base;
        if (base && from < base + guest.memory.segments[i].size && base < from + len)
            return 1;
    }
    return 0;
}

void sp_program_unmap(uintptr_t from, uintptr_t to)
{
    sp_views_remove(&views, from, to);
    if (!atomic_load(&guest.completed))
        return; /* where it is, it is served: it may be mapped again */
    for (unsigned i = 0; i < guest.memory.n_segments; i++)
        if (guest.memory.segments[i].base && unused(&guest.memory.segments[i]))
            unmap_segment(&guest.memory.segments[i]);
}

int sp_program_real(const struct stat *st, int cloexec)
{
    sp_trouble trouble;
    int fd;
    sp_answer answer = ask(SP_WISH_FILE, st, &fd, &trouble);
    if (answer == SP_ANSWER_ERROR)
        refuse(trouble.text);
    if (fd >= 0 && !cloexec)
        fcntl(fd, F_SETFD, 0);
    return fd;
}
