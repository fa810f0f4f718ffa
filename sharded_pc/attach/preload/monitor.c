#define _GNU_SOURCE
#include "monitor.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "../monitor/relay.h"

#define EXPORT __attribute__((visibility("default")))

static sp_relay relay;
static char *relay_path, *listener_path; /* NULL: none */
static int listener_fd = -1;
/* Written by whoever maps the last segment, before anybody connects. */
static atomic_int started;

const char *sp_monitor_configure(void)
{
    const char *monitor = getenv("SHARDED_PC_MONITOR"), *path = getenv("SHARDED_PC_MONITOR_RELAY");
    if (!monitor || !path)
        return monitor || path ? "both or none must be set" : NULL;
    if (strncmp(monitor, "fd:", 3) == 0) {
        char *end;
        long fd = strtol(monitor + 3, &end, 10);
        if (end == monitor + 3 || *end || fd < 0 || fd > 1 << 20)
            return "expected fd:N or a path";
        listener_fd = (int)fd;
    } else if (!(listener_path = strdup(monitor)))
        return "no memory";
    relay_path = strdup(path);
    return relay_path ? NULL : "no memory";
}

void sp_monitor_leave_environment(void)
{
    unsetenv("SHARDED_PC_MONITOR");
    unsetenv("SHARDED_PC_MONITOR_RELAY");
}

int sp_monitor_start(void)
{
    if (!relay_path)
        return 0;
    int rc = sp_relay_start(&relay, relay_path);
    atomic_store(&started, rc == 0);
    return rc;
}

static int is_listener(int sock)
{
    struct sockaddr_un own;
    socklen_t len = sizeof own;
    if (listener_fd >= 0)
        return sock == listener_fd;
    memset(&own, 0, sizeof own);
    return syscall(SYS_getsockname, sock, &own, &len) == 0 && own.sun_family == AF_UNIX &&
           strncmp(own.sun_path, listener_path, sizeof own.sun_path) == 0;
}

static int accepted(int sock, long client)
{
    if (client < 0 || !atomic_load(&started) || !is_listener(sock))
        return (int)client;
    return sp_relay_accepted(&relay, (int)client);
}

EXPORT int accept4(int sock, struct sockaddr *addr, socklen_t *len, int flags)
{
    return accepted(sock, syscall(SYS_accept4, sock, addr, len, flags));
}

EXPORT int accept(int sock, struct sockaddr *addr, socklen_t *len)
{
    return accepted(sock, syscall(SYS_accept4, sock, addr, len, 0));
}

/* QEMU asks as it accepts, and shows it (query-chardev): a pair has no name. */
EXPORT int getsockname(int sock, struct sockaddr *addr, socklen_t *len)
{
    if (!atomic_load(&started) || !sp_relay_has(&relay, sock))
        return (int)syscall(SYS_getsockname, sock, addr, len);
    return sp_relay_getsockname(&relay, addr, len);
}

EXPORT int close(int fd)
{
    if (atomic_load(&started) && sp_relay_has(&relay, fd))
        sp_relay_forget(&relay);
    return (int)syscall(SYS_close, fd);
}

EXPORT ssize_t recvmsg(int sock, struct msghdr *msg, int flags)
{
    if (!atomic_load(&started))
        return syscall(SYS_recvmsg, sock, msg, flags);
    return sp_relay_receive(&relay, sock, msg, flags);
}

long sp_monitor_sendmsg(int sock, const struct msghdr *msg, int flags)
{
    if (!atomic_load(&started))
        return syscall(SYS_sendmsg, sock, msg, flags);
    return sp_relay_send(&relay, sock, msg, flags);
}
