#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { RETRY_MS = 10 };

int sp_fail(sp_trouble *trouble, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(trouble->text, sizeof trouble->text, format, args);
    va_end(args);
    trouble->cause = SP_CAUSE_RECEIVER;
    return -1;
}

int sp_fail_as(sp_trouble *trouble, sp_cause cause, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(trouble->text, sizeof trouble->text, format, args);
    va_end(args);
    trouble->cause = cause;
    return -1;
}

uint64_t sp_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int sp_channel_init(sp_channel *channel, int with_stop)
{
    channel->sock = channel->stop = -1;
    if (with_stop)
        channel->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return with_stop && channel->stop < 0 ? -errno : 0;
}

void sp_channel_stop(sp_channel *channel)
{
    eventfd_write(channel->stop, 1);
}

void sp_channel_go_on(sp_channel *channel)
{
    eventfd_t count;
    eventfd_read(channel->stop, &count);
}

/* ppoll(2), not poll(2): a filter of system calls that a program has of its own (attach/program) has
 * room for what it uses itself. */
static int poll_ms(struct pollfd *pfds, nfds_t n, int ms)
{
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000L};
    return ppoll(pfds, n, ms < 0 ? NULL : &wait, NULL);
}

int sp_channel_pause(const sp_channel *channel, unsigned ms)
{
    struct pollfd pfd = {.fd = channel->stop, .events = POLLIN};
    uint64_t now = sp_clock_ns(), end = now + ms * 1000000ull;
    for (; now < end; now = sp_clock_ns())
        if (poll_ms(&pfd, 1, (int)((end - now + 999999) / 1000000)) > 0)
            return 1;
    return 0;
}

/* Waits until the socket is ready for `events`; the peer's going away counts. */
static int wait_for(const sp_channel *channel, short events, uint64_t deadline,
                    sp_trouble *trouble)
{
    struct pollfd pfds[] = {{.fd = channel->sock, .events = events},
                            {.fd = channel->stop, .events = POLLIN}};
    for (;;) {
        int ms = -1;
        if (deadline != SP_FOR_EVER) {
            uint64_t now = sp_clock_ns();
            uint64_t left = now < deadline ? (deadline - now + 999999) / 1000000 : 0;
            ms = left < 60000 ? (int)left : 60000;
        }
        int n = poll_ms(pfds, 2, ms);
        if (n > 0)
            return pfds[1].revents ? sp_fail_as(trouble, SP_CAUSE_STOPPED, "stopped") : 0;
        if (n < 0 && errno != EINTR)
            return sp_fail(trouble, "wait for the receiver: %s", strerror(errno));
        if (n == 0 && deadline != SP_FOR_EVER && sp_clock_ns() >= deadline)
            return sp_fail_as(trouble, SP_CAUSE_LATE, "the receiver did not answer in time");
    }
}

/* A full backlog of a Unix socket is EAGAIN, and nothing tells when it has room. */
static int connect_until(const sp_channel *channel, const struct sockaddr_un *addr,
                         uint64_t deadline)
{
    while (connect(channel->sock, (const struct sockaddr *)addr, sizeof *addr)) {
        int err = errno;
        if ((err != EAGAIN && err != EINTR) || sp_clock_ns() >= deadline ||
            sp_channel_pause(channel, RETRY_MS))
            return err;
    }
    return 0;
}

/* Who listens is given userfaultfds, and could write into us: this user could trace us anyway, and
 * root can do anything. */
static int check_peer(const sp_channel *channel, const char *path, sp_trouble *trouble)
{
    struct ucred peer;
    socklen_t len = sizeof peer;
    if (getsockopt(channel->sock, SOL_SOCKET, SO_PEERCRED, &peer, &len))
        return sp_fail(trouble, "connect to %s: %s", path, strerror(errno));
    if (peer.uid == 0 || peer.uid == geteuid())
        return 0;
    return sp_fail(trouble, "who listens at %s (process %d) belongs to uid %u: see who made that "
                            "socket", path, (int)peer.pid, (unsigned)peer.uid);
}

static int connect_to(const sp_channel *channel, const char *path, uint64_t deadline,
                      sp_trouble *trouble)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    memcpy(addr.sun_path, path, strlen(path));
    int err = connect_until(channel, &addr, deadline);
    if (err == 0)
        return check_peer(channel, path, trouble);
    sp_cause cause = err == EAGAIN                            ? SP_CAUSE_LATE
                     : err == ENOENT || err == ECONNREFUSED ? SP_CAUSE_NOBODY
                                                              : SP_CAUSE_RECEIVER;
    return sp_fail_as(trouble, cause, "connect to %s: %s", path, strerror(err));
}

void sp_channel_use(sp_channel *channel, int sock)
{
    channel->sock = sock;
    channel->n_rights = 0;
    channel->used = channel->len = 0;
    memset(&channel->cut, 0, sizeof channel->cut);
}

int sp_channel_open(sp_channel *channel, const char *path, uint64_t deadline, sp_trouble *trouble)
{
    sp_channel_use(channel, -1);
    if (strlen(path) >= sizeof ((struct sockaddr_un *)NULL)->sun_path)
        return sp_fail(trouble, "connect to %s: the path is longer than a Unix socket's", path);
    channel->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (channel->sock < 0)
        return sp_fail_as(trouble, SP_CAUSE_HOST, "make a socket: %s", strerror(errno));
    if (connect_to(channel, path, deadline, trouble) == 0)
        return 0;
    sp_channel_close(channel);
    return -1;
}

static ssize_t send_some(int sock, const char *data, size_t len, const int *fds, unsigned n_fds)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(SP_MAX_RIGHTS * sizeof(int))];
    } control;
    struct iovec iov = {(void *)(uintptr_t)data, len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (n_fds) {
        memset(&control, 0, sizeof control);
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        memcpy(CMSG_DATA(&control.header), fds, n_fds * sizeof(int));
    }
    return sendmsg(sock, &msg, MSG_NOSIGNAL);
}

int sp_channel_send(sp_channel *channel, const char *data, size_t len, const int *fds,
                    unsigned n_fds, uint64_t deadline, sp_trouble *trouble)
{
    while (len) {
        ssize_t n = send_some(channel->sock, data, len, fds, n_fds);
        if (n >= 0) {
            data += n;
            len -= (size_t)n;
            n_fds = 0;
        } else if (errno == EAGAIN) {
            if (wait_for(channel, POLLOUT, deadline, trouble))
                return -1;
        } else if (errno != EINTR) {
            return sp_fail(trouble, "speak to the receiver: %s", strerror(errno));
        }
    }
    return 0;
}

static int keep_rights(sp_channel *channel, struct cmsghdr *cmsg)
{
    size_t n = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    const unsigned char *at = CMSG_DATA(cmsg);
    int overflow = 0;
    for (size_t i = 0; i < n; i++) {
        int fd;
        memcpy(&fd, at + i * sizeof fd, sizeof fd);
        if (channel->n_rights < SP_MAX_RIGHTS) {
            channel->rights[channel->n_rights++] = fd;
        } else {
            close(fd);
            overflow = -1;
        }
    }
    return overflow;
}

static int take_rights(sp_channel *channel, struct msghdr *msg)
{
    int rc = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            rc |= keep_rights(channel, c);
    return rc || (msg->msg_flags & MSG_CTRUNC) ? -1 : 0;
}

/* Reads once: 1 something came, 0 the end, -1 trouble. */
static int read_some(sp_channel *channel, uint64_t deadline, sp_trouble *trouble)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(SP_MAX_RIGHTS * sizeof(int))];
    } control;
    for (;;) {
        struct iovec iov = {channel->buf + channel->len, sizeof channel->buf - channel->len};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
        ssize_t n = recvmsg(channel->sock, &msg, MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EAGAIN) {
            if (wait_for(channel, POLLIN, deadline, trouble))
                return -1;
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == ECONNRESET ? 0 : sp_fail(trouble, "hear the receiver: %s",
                                                     strerror(errno));
        if (take_rights(channel, &msg))
            return sp_fail(trouble, "the receiver sent more descriptors than this process can "
                                    "take; raise `ulimit -n`");
        channel->len += (size_t)n;
        return n > 0;
    }
}

int sp_channel_receive(sp_channel *channel, sp_message *message, uint64_t deadline,
                       sp_trouble *trouble)
{
    channel->len -= channel->used;
    memmove(channel->buf, channel->buf + channel->used, channel->len);
    channel->used = 0;
    for (;;) {
        long end = sp_message_end(&channel->cut, channel->buf, channel->len);
        if (end > 0) {
            channel->used = (size_t)end;
            if (sp_message_parse(channel->buf, channel->used, message) == 0)
                return 1;
            end = -1;
        }
        if (end < 0)
            return sp_fail(trouble, "the receiver said what the attach protocol does not allow");
        if (channel->len == sizeof channel->buf)
            return sp_fail(trouble, "the receiver's message is longer than %d bytes",
                           SP_MESSAGE_ROOM);
        int rc = read_some(channel, deadline, trouble);
        if (rc <= 0)
            return rc;
    }
}

void sp_channel_drop_rights(sp_channel *channel)
{
    while (channel->n_rights)
        close(channel->rights[--channel->n_rights]);
}

void sp_channel_close(sp_channel *channel)
{
    int sock = channel->sock;
    sp_channel_drop_rights(channel);
    channel->sock = -1; /* first: a child that is forked now must not close another's */
    if (sock >= 0)
        close(sock);
}

void sp_channel_deinit(sp_channel *channel)
{
    sp_channel_close(channel);
    if (channel->stop >= 0)
        close(channel->stop);
    channel->stop = -1;
}
