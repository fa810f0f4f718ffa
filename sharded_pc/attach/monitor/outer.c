/* What QEMU's own threads call, at its monitor's connection. */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void wake(sp_relay *r)
{
    uint64_t one = 1;
    while (write(r->wake, &one, sizeof one) < 0 && errno == EINTR) {
    }
}

static int unread(int sock)
{
    int n = 0;
    return ioctl(sock, FIONREAD, &n) ? -1 : n;
}

/* In QEMU's thread that polls `outer` and has just read from it: poll(2) goes on waiting for what was
 * under a descriptor as it began, so only that thread may put something else there.  QEMU does not write
 * meanwhile; the relay's thread is parked.  If anything is under way after all, it tries again. */
static void exchange(sp_relay *r)
{
    int outer = atomic_load(&r->outer);
    if (r->parked && unread(outer) > 0)
        return; /* QEMU comes again, for that */
    if (r->parked && unread(outer) == 0 && unread(r->inner) == 0 && sp_bytes_blank(&r->from_qemu) &&
        dup3(r->client, outer, O_CLOEXEC) >= 0) {
        atomic_store(&r->outer, -1);
        r->left = 1;
    }
    r->parked = 0;
    wake(r);
}

ssize_t sp_relay_receive(sp_relay *r, int fd, struct msghdr *msg, int flags)
{
    ssize_t n = syscall(SYS_recvmsg, fd, msg, flags);
    if (n > 0 && sp_relay_has(r, fd)) {
        pthread_mutex_lock(&r->lock);
        if (r->parked && sp_relay_has(r, fd))
            exchange(r);
        pthread_mutex_unlock(&r->lock);
    }
    return n;
}

ssize_t sp_relay_send(sp_relay *r, int fd, const struct msghdr *msg, int flags)
{
    if (!sp_relay_has(r, fd))
        return syscall(SYS_sendmsg, fd, msg, flags);
    pthread_mutex_lock(&r->lock);
    ssize_t n = syscall(SYS_sendmsg, fd, msg, flags);
    int err = errno;
    pthread_mutex_unlock(&r->lock);
    errno = err;
    return n;
}

int sp_relay_accepted(sp_relay *r, int client)
{
    int pair[2];
    fcntl(client, F_SETFL, fcntl(client, F_GETFL) | O_NONBLOCK);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
        int err = errno;
        close(client);
        errno = err;
        return -1;
    }
    fcntl(pair[1], F_SETFL, O_NONBLOCK);
    pthread_mutex_lock(&r->lock);
    if (r->left) {
        pthread_mutex_unlock(&r->lock);
        close(pair[0]);
        close(pair[1]);
        return client;
    }
    if (r->next_client >= 0) { /* QEMU has closed its end of that one already */
        close(r->next_client);
        close(r->next_inner);
    }
    r->next_client = client;
    r->next_inner = pair[1];
    atomic_store(&r->outer, pair[0]);
    pthread_mutex_unlock(&r->lock);
    wake(r);
    return pair[0];
}

int sp_relay_has(sp_relay *r, int fd)
{
    return fd >= 0 && atomic_load(&r->outer) == fd;
}

int sp_relay_getsockname(sp_relay *r, struct sockaddr *addr, unsigned *len)
{
    pthread_mutex_lock(&r->lock);
    int client = r->next_client >= 0 ? r->next_client : r->client;
    long rc = syscall(SYS_getsockname, client, addr, len);
    pthread_mutex_unlock(&r->lock);
    return (int)rc;
}

void sp_relay_forget(sp_relay *r)
{
    pthread_mutex_lock(&r->lock);
    atomic_store(&r->outer, -1);
    r->parked = 0;
    wake(r);
    pthread_mutex_unlock(&r->lock);
}
