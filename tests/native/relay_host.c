/* A process with a monitor, for tests of attach/monitor: what QEMU is to the relay.
 *
 *   relay_host LISTENER RECEIVER
 *
 * Its monitor greets, reads byte by byte as QEMU's does, and answers each command with its name and
 * the number of descriptors that came; before that it says MIGRATION, and OTHER.  A second thread says TICK all the
 * time, numbered, to whoever is connected: nothing of it may get lost or cut by an exchange.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "attach/monitor/relay.h"

static sp_relay relay;
static pthread_mutex_t monitor = PTHREAD_MUTEX_INITIALIZER; /* of `fd`, as QEMU's chr_write_lock */
static int fd = -1;

/* As QEMU's chardev. */
static void put(const char *text)
{
    pthread_mutex_lock(&monitor);
    for (size_t left = strlen(text); fd >= 0 && left;) {
        struct iovec iov = {.iov_base = (char *)(uintptr_t)text, .iov_len = left};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        ssize_t n = sp_relay_send(&relay, fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            struct pollfd pfd = {.fd = fd, .events = POLLOUT};
            poll(&pfd, 1, 100);
        } else if (n < 0)
            break;
        else {
            text += n;
            left -= (size_t)n;
        }
    }
    pthread_mutex_unlock(&monitor);
}

static void *tick(void *arg)
{
    char line[64];
    (void)arg;
    for (unsigned n = 0;; n++) {
        usleep(200);
        snprintf(line, sizeof line, "{\"event\": \"TICK\", \"data\": %u}\r\n", n);
        put(line);
    }
    return NULL;
}

static void answer(const char *json, size_t len, int fds)
{
    sp_text name = {"null", 4}, id = {"null", 4};
    char *line = NULL;
    sp_qmp_member(json, len, "execute", &name);
    sp_qmp_member(json, len, "id", &id);
    put("{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"MIGRATION\"}\r\n");
    put("{\"event\": \"OTHER\"}\r\n");
    if (asprintf(&line, "{\"return\": {\"did\": %.*s, \"fds\": %d}, \"id\": %.*s}\r\n", (int)name.len,
                 name.at, fds, (int)id.len, id.at) > 0)
        put(line);
    free(line);
}

/* One byte, with what came beside it; 0 at the end. */
static int get(char *c, int *fds)
{
    char space[CMSG_SPACE(8 * sizeof(int))];
    struct iovec iov = {.iov_base = c, .iov_len = 1};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space,
                         .msg_controllen = sizeof space};
    for (;;) {
        struct pollfd pfd = {.fd = fd, .events = POLLIN};
        poll(&pfd, 1, -1);
        if (pfd.revents & POLLHUP) /* as QEMU's hup_source */
            return 0;
        ssize_t n = sp_relay_receive(&relay, fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EAGAIN)
            continue;
        struct cmsghdr *head = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
        for (size_t at = 0; head && at + sizeof(int) <= head->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            int one;
            memcpy(&one, CMSG_DATA(head) + at, sizeof one);
            close(one);
            ++*fds;
        }
        return n > 0;
    }
}

static void serve(void)
{
    static char buf[1 << 16];
    sp_cut cut = {0};
    size_t len = 0;
    int fds = 0;
    put("{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n");
    while (len < sizeof buf && get(buf + len, &fds)) {
        len++;
        long end = sp_message_end(&cut, buf, len);
        if (end > 0)
            answer(buf, (size_t)end, fds);
        if (end < 0)
            put("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n");
        if (end) {
            len = 0;
            fds = 0;
            cut = (sp_cut){0};
        }
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    pthread_t ticking;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc != 3 || strlen(argv[1]) >= sizeof addr.sun_path || sp_relay_start(&relay, argv[2]))
        return 2;
    strcpy(addr.sun_path, argv[1]);
    if (bind(listener, (struct sockaddr *)&addr, sizeof addr) || listen(listener, 1) ||
        pthread_create(&ticking, NULL, tick, NULL))
        return 2;
    puts("listens");
    fflush(stdout);
    for (;;) {
        int client = sp_relay_accepted(&relay, accept(listener, NULL, NULL));
        if (client < 0)
            return 3;
        pthread_mutex_lock(&monitor);
        fd = client;
        pthread_mutex_unlock(&monitor);
        serve();
        pthread_mutex_lock(&monitor);
        fd = -1;
        if (sp_relay_has(&relay, client))
            sp_relay_forget(&relay);
        close(client);
        pthread_mutex_unlock(&monitor);
    }
}
