/* What is held back while pages are missing.  QEMU does not know that it is in postcopy, so what it
 * would not do then is kept from it here, on segments alone:
 *
 *   fallocate, madvise(DONTNEED, REMOVE, FREE)   forgotten, as QEMU's balloon and free page reporting
 *                                  are in its own postcopy: a page dropped between its arrival and its
 *                                  `received` bit would be zeros for good
 *   madvise(HUGEPAGE)              put off: until Linux 6.4 khugepaged fills holes that wait for a page
 *   madvise(COLLAPSE)              refused: it would show what stands in a page that is not received
 *   madvise(DOFORK)                put off: a child has no userfaultfd, it would read zeros
 *   sendmsg(SCM_RIGHTS)            a segment's descriptor goes as one that names the file and cannot be
 *                                  mapped (O_PATH): whoever maps it elsewhere (a vhost-user back-end)
 *                                  would read zeros.  Under `sharded-pc guest` (attach/program) it is
 *                                  exchanged for a real one there
 */
#define _GNU_SOURCE
#include "hold.h"
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef MADV_FREE
#define MADV_FREE 8
#endif
#define SP_MADV_COLLAPSE 25 /* Linux 6.1; Debian 12's headers lack it */

/* NULL: nothing is held back.  Writers: the constructor, then whoever hears that all is here. */
static _Atomic(sp_guest *) watched;
/* Of `watched` becoming NULL, and of what segments put off. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void sp_hold_watch(sp_guest *guest)
{
    atomic_store(&watched, guest);
}

void sp_hold_forget(void)
{
    atomic_store(&watched, NULL);
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

void sp_hold_end(sp_guest *guest)
{
    pthread_mutex_lock(&lock);
    atomic_store(&watched, NULL);
    sp_memory_let_go(&guest->memory);
    pthread_mutex_unlock(&lock);
}

sp_segment *sp_guest_segment(sp_guest *guest, int fd)
{
    struct stat st;
    if (fstat(fd, &st))
        return NULL;
    for (unsigned i = 0; i < guest->memory.n_segments; i++)
        if (guest->memory.segments[i].dev == st.st_dev && guest->memory.segments[i].ino == st.st_ino)
            return &guest->memory.segments[i];
    return NULL;
}

static sp_segment *segment_at(sp_guest *guest, const void *addr, size_t len)
{
    uintptr_t from = (uintptr_t)addr, to = from + len;
    for (unsigned i = 0; i < guest->memory.n_segments; i++) {
        uintptr_t base = (uintptr_t)guest->memory.segments[i].base;
        if (base && from < base + guest->memory.segments[i].size && base < to)
            return &guest->memory.segments[i];
    }
    return NULL;
}

/* --- advice --- */

typedef enum verdict { GO_ON, FORGET, REFUSE } verdict;

static verdict judge(sp_segment *segment, int advice)
{
    switch (advice) {
    case MADV_DONTNEED:
    case MADV_REMOVE:
    case MADV_FREE:
        return FORGET;
    case MADV_HUGEPAGE:
    case MADV_NOHUGEPAGE:
        segment->no_huge = advice == MADV_NOHUGEPAGE;
        return segment->no_huge ? GO_ON : FORGET;
    case MADV_DONTFORK:
    case MADV_DOFORK:
        segment->dont_fork = advice == MADV_DONTFORK;
        return segment->dont_fork ? GO_ON : FORGET;
    case SP_MADV_COLLAPSE:
        return REFUSE;
    default:
        return GO_ON;
    }
}

EXPORT int madvise(void *addr, size_t len, int advice)
{
    verdict what = GO_ON;
    if (atomic_load(&watched)) {
        pthread_mutex_lock(&lock);
        sp_guest *guest = atomic_load(&watched);
        sp_segment *segment = guest ? segment_at(guest, addr, len) : NULL;
        if (segment)
            what = judge(segment, advice);
        pthread_mutex_unlock(&lock);
    }
    if (what == GO_ON)
        return (int)syscall(SYS_madvise, addr, len, advice);
    errno = EAGAIN;
    return what == FORGET ? 0 : -1;
}

/* --- holes --- */

static int is_held(int fd)
{
    sp_guest *guest = atomic_load(&watched);
    return guest && sp_guest_segment(guest, fd);
}

static int allocate(int fd, int mode, off_t offset, off_t len)
{
    if (!is_held(fd))
        return (int)syscall(SYS_fallocate, fd, mode, offset, len);
    errno = EOPNOTSUPP; /* memory given to a hole would be zeros that nobody waits for */
    return mode & FALLOC_FL_PUNCH_HOLE ? 0 : -1;
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t len)
{
    return allocate(fd, mode, offset, len);
}

EXPORT int fallocate64(int fd, int mode, off_t offset, off_t len)
{
    return allocate(fd, mode, offset, len);
}

/* --- descriptors --- */

enum { MOST_RIGHTS = SP_MAX_RIGHTS }; /* of one message */

typedef struct tokens {
    int fds[MOST_RIGHTS];
    unsigned n;
} tokens;

/* One that says which file this is, and cannot be mapped; -1. */
static int make_token(const sp_segment *segment, int fd)
{
    char link[32];
    int token = open(segment->path, O_PATH | O_CLOEXEC);
    struct stat st;
    if (token >= 0 && fstat(token, &st) == 0 && st.st_dev == segment->dev &&
        st.st_ino == segment->ino)
        return token;
    if (token >= 0)
        close(token);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return open(link, O_PATH | O_CLOEXEC);
}

static int exchange(sp_guest *guest, struct cmsghdr *c, tokens *made)
{
    for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
        int fd;
        memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
        sp_segment *segment = sp_guest_segment(guest, fd);
        if (!segment)
            continue;
        fd = made->n < MOST_RIGHTS ? make_token(segment, fd) : -1;
        if (fd < 0)
            return -1;
        made->fds[made->n++] = fd;
        memcpy(CMSG_DATA(c) + at, &fd, sizeof fd);
    }
    return 0;
}

/* The message with tokens in place of segments: `control` is a copy of its own. */
static int exchange_all(struct msghdr *msg, tokens *made)
{
    sp_guest *guest = atomic_load(&watched);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); guest && c; c = CMSG_NXTHDR(msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && exchange(guest, c, made))
            return -1;
    return 0;
}

static ssize_t send_tokens(int sock, const struct msghdr *msg, int flags)
{
    struct msghdr copy = *msg;
    tokens made = {.n = 0};
    ssize_t n = -1;
    int err = ENOMEM;
    copy.msg_control = malloc(msg->msg_controllen);
    if (copy.msg_control) {
        memcpy(copy.msg_control, msg->msg_control, msg->msg_controllen);
        err = exchange_all(&copy, &made) ? EPERM : 0;
        if (!err && (n = syscall(SYS_sendmsg, sock, &copy, flags)) < 0)
            err = errno;
    }
    if (err == EPERM)
        sp_say(SP_PRELOAD, "this process's RAM is not handed to another one while pages are "
                           "missing: that one would read zeros (a vhost-user back-end?)");
    while (made.n)
        close(made.fds[--made.n]);
    free(copy.msg_control);
    errno = err;
    return n;
}

static int carries_segment(const struct msghdr *msg)
{
    struct msghdr *head = (struct msghdr *)(uintptr_t)msg; /* CMSG_NXTHDR only reads */
    for (struct cmsghdr *c = CMSG_FIRSTHDR(head); c; c = CMSG_NXTHDR(head, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
            if (is_held(fd))
                return 1;
        }
    }
    return 0;
}

EXPORT ssize_t sendmsg(int sock, const struct msghdr *msg, int flags)
{
    if (atomic_load(&watched) && msg && msg->msg_controllen && carries_segment(msg))
        return send_tokens(sock, msg, flags);
    return sp_monitor_sendmsg(sock, msg, flags);
}
