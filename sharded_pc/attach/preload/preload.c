/* LD_PRELOAD library: makes an unmodified QEMU a guest of a sharded_pc receiver.
 *
 *   SHARDED_PC_ATTACH          path of the receiver's attach socket
 *   SHARDED_PC_SEGMENTS        the RAM files that this process will map, separated by ':' or ',':
 *                              paths, or names in /dev/shm
 *   SHARDED_PC_ATTACH_TIMEOUT  seconds for the hand-over, 30 unless given
 *   SHARDED_PC_BOUND           set: ends with its receiver until memory may be touched
 *   SHARDED_PC_MONITOR[_RELAY] monitor.h
 *
 * The variables stay until the segments are mapped, so that a shell or `nice` may stand in front.
 *
 * QEMU maps each memory-backend-file once, whole, with MAP_SHARED | MAP_FIXED over a reservation.
 * The call that maps the last of the files hands all of them over before it returns, so that no
 * access can come before the registration; until then those mapped before it are PROT_NONE.
 *
 * Whatever would let this process see memory that is not registered ends it with code 3 and one
 * line on stderr: it would read zeros where the source has data, and nobody would notice.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "hold.h"
#include "monitor.h"

#define EXPORT __attribute__((visibility("default")))

static_assert(sizeof(off_t) == 8 && sizeof(long) == 8, "mmap takes its offset in one register");

enum { EXIT_HOST = 3, DEFAULT_SECONDS = 30, MAX_SECONDS = 1000000 };

static const sp_guest_kind KIND = {.who = SP_PRELOAD, .let_go = sp_hold_end};
static sp_guest guest;
static uint64_t timeout_ns;
static pid_t owner;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of what follows, and of `guest` */
static int handed_over;

/* Written by the constructor and then by whoever finds that there is nothing left to do; 0 before
 * the constructor, when other libraries' constructors may map things already. */
static atomic_int watching;

__attribute__((noreturn)) static void die(const char *what, const char *why)
{
    sp_say(SP_PRELOAD, "%s: %s", what, why);
    _exit(EXIT_HOST);
}

/* --- what is told by the environment --- */

static void add_segment(const char *name)
{
    /* "guest0.pc.ram" and POSIX's "/guest0.pc.ram" are in /dev/shm, anything else is a path. */
    int is_path = name[0] == '/' && strchr(name + 1, '/');
    sp_segment segment = {.prot = PROT_NONE};
    struct stat st;
    if (!is_path && *name == '/')
        name++;
    if (asprintf(&segment.path, "%s%s", is_path ? "" : "/dev/shm/", name) < 0)
        die(name, "no memory");
    if (stat(segment.path, &st))
        die(segment.path, strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size == 0)
        die(segment.path, "not a file of a receiver");
    segment.dev = st.st_dev;
    segment.ino = st.st_ino;
    segment.size = (uint64_t)st.st_size;
    sp_memory *memory = &guest.memory;
    sp_segment *more = memory->n_segments < SP_MAX_RIGHTS
                           ? realloc(memory->segments, (memory->n_segments + 1) * sizeof segment)
                           : NULL;
    if (!more)
        die("SHARDED_PC_SEGMENTS", "too many");
    memory->segments = more;
    memory->segments[memory->n_segments++] = segment;
}

static void add_segments(const char *list)
{
    char *copy = strdup(list), *rest = copy;
    for (char *name; copy && (name = strsep(&rest, ":,"));)
        if (*name)
            add_segment(name);
    free(copy);
    if (guest.memory.n_segments == 0)
        die("SHARDED_PC_SEGMENTS", "names no file");
}

static uint64_t seconds_ns(const char *text)
{
    char *end;
    if (!text)
        return DEFAULT_SECONDS * 1000000000ull;
    double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds > 0 && seconds <= MAX_SECONDS))
        die("SHARDED_PC_ATTACH_TIMEOUT", "expected a number of seconds");
    return (uint64_t)(seconds * 1e9);
}

/* Takes this library out of LD_PRELOAD; what else is in there stays. */
static void leave_ld_preload(void)
{
    Dl_info info;
    const char *list = getenv("LD_PRELOAD");
    char *copy = list ? strdup(list) : NULL, *rest = copy, *kept = list ? strdup(list) : NULL;
    if (!copy || !kept || !dladdr(&guest, &info))
        die("LD_PRELOAD", "cannot be read");
    const char *slash = strrchr(info.dli_fname, '/');
    const char *own = slash ? slash + 1 : info.dli_fname;
    kept[0] = '\0';
    for (char *entry; (entry = strsep(&rest, ": "));) {
        slash = strrchr(entry, '/');
        if (*entry && strcmp(slash ? slash + 1 : entry, own) != 0)
            strcat(strcat(kept, *kept ? ":" : ""), entry);
    }
    if (*kept)
        setenv("LD_PRELOAD", kept, 1);
    else
        unsetenv("LD_PRELOAD");
    free(copy);
    free(kept);
}

/* The process that maps the segments is found, so its children need nothing of us.  Not earlier: this
 * may be a shell, `nice`, `numactl` or `env` in front of it. */
static void leave_environment(void)
{
    if (getenv("LD_PRELOAD"))
        leave_ld_preload();
    unsetenv("SHARDED_PC_ATTACH");
    unsetenv("SHARDED_PC_SEGMENTS");
    unsetenv("SHARDED_PC_ATTACH_TIMEOUT");
    unsetenv("SHARDED_PC_BOUND");
    sp_monitor_leave_environment();
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("SHARDED_PC_ATTACH"), *list = getenv("SHARDED_PC_SEGMENTS");
    if (!path && !list)
        return;
    if (!path || !list)
        die(path ? "SHARDED_PC_SEGMENTS" : "SHARDED_PC_ATTACH", "is not set");
    timeout_ns = seconds_ns(getenv("SHARDED_PC_ATTACH_TIMEOUT"));
    guest.bound = getenv("SHARDED_PC_BOUND") != NULL;
    guest.kind = &KIND;
    guest.socket_path = strdup(path);
    sp_channel_init(&guest.channel, 0); /* its thread ends with the process */
    add_segments(list);
    const char *wrong = sp_monitor_configure();
    if (wrong)
        die("SHARDED_PC_MONITOR", wrong);
    owner = getpid();
    sp_hold_watch(&guest);
    atomic_store(&watching, 1);
}

/* --- the hand-over --- */

/* Bytes of the segment that /proc/self/maps shows, or -1 if it is mapped anywhere else but at its
 * base: what is seen through another mapping would not be registered. */
static int64_t mapped_bytes(const sp_segment *segment, FILE *maps)
{
    char line[512];
    int64_t total = 0;
    uint64_t base = (uint64_t)(uintptr_t)segment->base;
    rewind(maps);
    while (fgets(line, sizeof line, maps)) {
        uint64_t from, to, ino;
        unsigned major, minor;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*x %x:%x %" SCNu64, &from, &to, &major,
                   &minor, &ino) != 5 ||
            ino != segment->ino || makedev(major, minor) != segment->dev)
            continue;
        if (from < base || to > base + segment->size)
            return -1;
        total += (int64_t)(to - from);
    }
    return total;
}

static void check_mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps)
        die("/proc/self/maps", strerror(errno));
    for (unsigned i = 0; i < guest.memory.n_segments; i++) {
        const sp_segment *segment = &guest.memory.segments[i];
        int64_t bytes = mapped_bytes(segment, maps);
        if (bytes < 0)
            die(segment->path, "mapped a second time: it cannot be registered there");
        if ((uint64_t)bytes != segment->size)
            die(segment->path, "not mapped any more");
    }
    fclose(maps);
}

static void hand_over(void)
{
    sp_trouble trouble;
    check_mappings();
    if (sp_guest_attach(&guest, sp_clock_ns() + timeout_ns, &trouble))
        die("attach", trouble.text);
    for (unsigned i = 0; i < guest.memory.n_segments; i++) {
        const sp_segment *segment = &guest.memory.segments[i];
        if (mprotect(segment->base, segment->size, segment->prot))
            die("mprotect", strerror(errno));
    }
    handed_over = 1;
    leave_environment();
    int rc = sp_monitor_start();
    if (rc)
        die("monitor", strerror(-rc));
    if (!atomic_load(&guest.completed) && sp_guest_follow(&guest, &trouble))
        die("attach", trouble.text);
}

/* Why a mapping of a segment cannot be; NULL if it can. */
static const char *objection(const sp_segment *segment, size_t len, int flags, off_t offset)
{
    int type = flags & MAP_TYPE;
    if (getpid() != owner)
        return "mapped by a child of the process that attaches (is it QEMU's -daemonize?)";
    if (type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
        return "mapped private: use share=on";
    if (offset != 0 || ((len + 4095) & ~(size_t)4095) != segment->size)
        return "mapped in part: the whole file must be mapped at once";
    if (handed_over)
        return "mapped again after it was handed over: it cannot be registered there";
    return NULL;
}

static void note(void *base, size_t len, int prot, int flags, int fd, off_t offset)
{
    int err = errno;
    sp_segment *segment = sp_guest_segment(&guest, fd);
    if (segment) {
        const char *why = objection(segment, len, flags, offset);
        if (why)
            die(segment->path, why);
        segment->base = base;
        segment->prot = prot;
        unsigned mapped = 0;
        for (unsigned i = 0; i < guest.memory.n_segments; i++)
            mapped += guest.memory.segments[i].base != NULL;
        if (mapped == guest.memory.n_segments)
            hand_over();
        else if (mprotect(base, len, PROT_NONE))
            die("mprotect", strerror(errno));
    }
    errno = err;
}

/* The plain system call, not the next library's mmap: it works before any constructor has run. */
static void *map(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    long at = syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
    if (!atomic_load_explicit(&watching, memory_order_acquire) || at == -1 || fd < 0 ||
        (flags & MAP_ANONYMOUS))
        return (void *)at;
    pthread_mutex_lock(&lock);
    if (!atomic_load(&guest.completed))
        note((void *)at, len, prot, flags, fd, offset);
    else
        atomic_store(&watching, 0);
    pthread_mutex_unlock(&lock);
    return (void *)at;
}

/* QEMU makes a backend's file where it finds none, and would run on it: its receiver is gone. */
static int open_file(const char *path, int flags, mode_t mode)
{
    if ((flags & O_CREAT) && atomic_load_explicit(&watching, memory_order_acquire)) {
        pthread_mutex_lock(&lock);
        for (unsigned i = 0; !handed_over && i < guest.memory.n_segments; i++)
            if (strcmp(guest.memory.segments[i].path, path) == 0)
                die(path, "is not there any more: the receiver is gone");
        pthread_mutex_unlock(&lock);
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static mode_t mode_of(int flags, va_list args)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(args, mode_t) : 0;
}

EXPORT int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = mode_of(flags, args);
    va_end(args);
    return open_file(path, flags, mode);
}

EXPORT int open64(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = mode_of(flags, args);
    va_end(args);
    return open_file(path, flags, mode);
}

EXPORT void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    return map(addr, len, prot, flags, fd, offset);
}

EXPORT void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    return map(addr, len, prot, flags, fd, offset);
}
