/* LD_PRELOAD library of `sharded-pc guest`: the calls of a program that meet a receiver's RAM.
 *
 *   SHARDED_PC_BROKER  name of the abstract Unix socket of the process beside (attach/broker.py)
 *
 *   mmap      RAM is where it is served: the program is told an address in there
 *   munmap    it is the program's no more, and is served until everything is here
 *   mremap    refused: it would be moved to where nobody serves it
 *   recvmsg   a descriptor that only names the RAM (preload/hold.c) becomes a real one
 *
 * What the program may not do to it meanwhile: preload/hold.c.  Children that it starts are watched as
 * well.  What it does by system calls of its own, or linked into itself, is not seen: then a real
 * descriptor is what it is never sent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../guest/guest.h"
#include "../preload/monitor.h"
#include "program.h"

#define EXPORT __attribute__((visibility("default")))
#define FIXED (MAP_FIXED | MAP_FIXED_NOREPLACE)

/* Nobody stands at a monitor of this program. */
long sp_monitor_sendmsg(int sock, const struct msghdr *msg, int flags)
{
    return syscall(SYS_sendmsg, sock, msg, flags);
}

/* Why the program cannot have it this way; NULL: it can. */
static const char *objection(int flags)
{
    int type = flags & MAP_TYPE;
    if (type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
        return "mapped private: a copy of a page that is missing would be zeros; map it shared";
    if (flags & FIXED)
        return "mapped at an address that the program chose (MAP_FIXED): it is served elsewhere";
    return NULL;
}

static void *view(const struct stat *st, size_t len, int flags, off_t offset)
{
    const char *why = objection(flags);
    void *at = why ? NULL : sp_program_view(st, len, offset);
    if (why) {
        sp_say(SP_PROGRAM, "a receiver's RAM cannot be %s", why);
        errno = EINVAL;
    }
    return at ? at : MAP_FAILED;
}

static void *map(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    struct stat st;
    sp_whose whose = SP_WHOSE_OTHER;
    void *at = MAP_FAILED;
    int err = errno;
    if (!(flags & MAP_ANONYMOUS) && sp_program_watches() && sp_program_may_be_ram(fd, &st)) {
        sp_program_lock();
        whose = sp_program_find(&st);
        if (whose == SP_WHOSE_RECEIVER)
            at = view(&st, len, flags, offset);
        sp_program_unlock();
    }
    if (whose == SP_WHOSE_OTHER)
        return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
    if (whose == SP_WHOSE_NOBODY)
        errno = EACCES;
    else if (at != MAP_FAILED)
        errno = err;
    return at;
}

EXPORT void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    return map(addr, len, prot, flags, fd, offset);
}

EXPORT void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    return map(addr, len, prot, flags, fd, offset);
}

EXPORT int munmap(void *addr, size_t len)
{
    uintptr_t from = (uintptr_t)addr, to = (from + len + 4095) & ~(uintptr_t)4095;
    int ours = 0;
    if (from % 4096 == 0 && sp_program_has_memory()) {
        sp_program_lock();
        ours = sp_program_meets(addr, len);
        if (ours)
            sp_program_unmap(from, to);
        sp_program_unlock();
    }
    return ours ? 0 : (int)syscall(SYS_munmap, addr, len);
}

static int meets(const void *addr, size_t len)
{
    if (!sp_program_has_memory())
        return 0;
    sp_program_lock();
    int is = sp_program_meets(addr, len);
    sp_program_unlock();
    return is;
}

EXPORT void *mremap(void *old, size_t old_len, size_t len, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    void *to = flags & MREMAP_FIXED ? va_arg(args, void *) : NULL;
    va_end(args);
    if (!meets(old, old_len ? old_len : 1))
        return (void *)syscall(SYS_mremap, old, old_len, len, flags, to);
    if (len <= old_len && !(flags & MREMAP_FIXED)) {
        if (len < old_len)
            munmap((char *)old + len, old_len - len);
        return old;
    }
    sp_say(SP_PROGRAM, "a receiver's RAM cannot be moved or grown (mremap): it is served where it is");
    errno = ENOMEM;
    return MAP_FAILED;
}

/* The descriptor only names a file; opened with O_PATH it cannot be mapped, read or written. */
static int is_token(int fd, struct stat *st)
{
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && flags & O_PATH && sp_program_may_be_ram(fd, st);
}

static void exchange(unsigned char *at)
{
    struct stat st;
    int fd, real = -1;
    memcpy(&fd, at, sizeof fd);
    if (!is_token(fd, &st))
        return;
    int cloexec = fcntl(fd, F_GETFD) & FD_CLOEXEC;
    sp_program_lock();
    if (sp_program_find(&st) != SP_WHOSE_NOBODY)
        real = sp_program_real(&st, cloexec);
    sp_program_unlock();
    if (real < 0)
        return; /* it cannot be mapped, which the program finds out */
    close(fd);
    memcpy(at, &real, sizeof real);
}

EXPORT ssize_t recvmsg(int sock, struct msghdr *msg, int flags)
{
    ssize_t n = syscall(SYS_recvmsg, sock, msg, flags);
    int err = errno;
    if (n < 0 || !msg->msg_controllen || !sp_program_watches())
        return n;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int))
                exchange(CMSG_DATA(c) + at);
    errno = err;
    return n;
}
