#define _GNU_SOURCE
#include "broker.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

typedef struct question {
    uint8_t wish, room[7];
    uint64_t dev, ino;
} question; /* attach/broker.py QUESTION */

typedef union rights {
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof(int))];
} rights;

int sp_broker_open(sp_broker *broker, const char *name)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    size_t len = strlen(name);
    struct ucred peer;
    socklen_t peer_len = sizeof peer;
    if (len >= sizeof addr.sun_path)
        return -ENAMETOOLONG;
    memcpy(addr.sun_path + 1, name, len);
    broker->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (broker->sock < 0)
        return -errno;
    socklen_t addr_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + len);
    int err = 0;
    if (connect(broker->sock, (const struct sockaddr *)&addr, addr_len) ||
        getsockopt(broker->sock, SOL_SOCKET, SO_PEERCRED, &peer, &peer_len))
        err = errno;
    else if (peer.uid != 0 && peer.uid != geteuid()) /* anybody may take an abstract name */
        err = EPERM;
    if (!err)
        return 0;
    close(broker->sock);
    broker->sock = -1;
    return -err;
}

/* The system calls, not this library's own sendmsg() and recvmsg(). */
static ssize_t say(int sock, const void *data, size_t len, int fd)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    rights control = {.header = {CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS}};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        msg.msg_control = &control;
        msg.msg_controllen = sizeof control;
    }
    return syscall(SYS_sendmsg, sock, &msg, MSG_NOSIGNAL);
}

static ssize_t hear(int sock, char *data, size_t room, int *fd)
{
    struct iovec iov = {data, room};
    rights control;
    struct msghdr msg;
    ssize_t n;
    do {
        msg = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                              .msg_controllen = sizeof control};
        n = syscall(SYS_recvmsg, sock, &msg, MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(c), sizeof *fd);
    return n;
}

void sp_broker_fork(sp_broker *broker)
{
    int pair[2] = {-1, -1};
    if (broker->sock < 0)
        return;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0 &&
        say(broker->sock, "N", 1, pair[1]) < 0) {
        close(pair[0]);
        pair[0] = -1;
    }
    if (pair[1] >= 0)
        close(pair[1]);
    close(broker->sock);
    broker->sock = pair[0];
}

sp_answer sp_broker_ask(sp_broker *broker, sp_wish wish, dev_t dev, ino_t ino, int *fd,
                        sp_trouble *trouble)
{
    question ask = {.wish = (uint8_t)wish, .dev = dev, .ino = ino};
    char answer[sizeof trouble->text] = "";
    *fd = -1;
    ssize_t n = broker->sock < 0 ? 0 : say(broker->sock, &ask, sizeof ask, -1);
    if (n > 0)
        n = hear(broker->sock, answer, sizeof answer - 1, fd);
    if (n <= 0)
        return sp_fail(trouble, "the process that `sharded-pc guest` left beside this one has ended"),
               SP_ANSWER_ERROR;
    answer[n] = '\0';
    if (answer[0] == SP_ANSWER_NONE || *fd >= 0)
        return (sp_answer)answer[0];
    sp_fail(trouble, "%s", answer[0] == SP_ANSWER_ERROR ? answer + 1
                           : "a descriptor was lost: raise `ulimit -n`");
    return SP_ANSWER_ERROR;
}
