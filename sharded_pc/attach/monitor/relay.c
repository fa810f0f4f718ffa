#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../guest/channel.h"

enum { CHUNK = 65536, MOST_PENDING = 64 << 20, RETRY_MS = 250 };

/* Answered by the receiver until the migration is over. */
static const char *const OWNED[] = {
    "migrate-incoming",    "migrate-recover",          "migrate-pause",
    "query-migrate",       "migrate-set-capabilities", "query-migrate-capabilities",
    "migrate-set-parameters", "migrate",               "migrate_cancel",
};

static uint64_t now_ms(void)
{
    return sp_clock_ns() / 1000000;
}

/* --- sending --- */

/* All of it, to a socket that does not block; the descriptors go with the first byte.  0, or -1: the
 * peer is gone.  Not libc's sendmsg, which is QEMU's here. */
static int send_all(int sock, const char *data, size_t len, const int *fds, unsigned n_fds)
{
    while (len) {
        char space[CMSG_SPACE(sizeof(int) * SP_RELAY_MAX_FDS)] = {0};
        struct iovec iov = {.iov_base = (char *)(uintptr_t)data, .iov_len = len};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        if (n_fds) {
            msg.msg_control = space;
            msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
            struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
            *head = (struct cmsghdr){CMSG_LEN(sizeof(int) * n_fds), SOL_SOCKET, SCM_RIGHTS};
            memcpy(CMSG_DATA(head), fds, sizeof(int) * n_fds);
        }
        ssize_t n = syscall(SYS_sendmsg, sock, &msg, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            struct pollfd pfd = {.fd = sock, .events = POLLOUT};
            poll(&pfd, 1, -1);
        } else if (n < 0 && errno != EINTR)
            return -1;
        else if (n > 0) {
            data += n;
            len -= (size_t)n;
            n_fds = 0;
        }
    }
    return 0;
}

/* A client or QEMU that is gone is noticed where it is read. */
static void say(int sock, const char *json, size_t len)
{
    if (sock >= 0 && send_all(sock, json, len, NULL, 0) == 0)
        send_all(sock, "\r\n", 2, NULL, 0);
}

static void tell_receiver(sp_relay *r, uint32_t kind, const char *data, size_t len)
{
    sp_frame frame = {kind, (uint32_t)len};
    if (r->receiver >= 0 && send_all(r->receiver, (const char *)&frame, sizeof frame, NULL, 0) == 0)
        send_all(r->receiver, data, len, NULL, 0);
}

/* --- the client's commands --- */

static void drop_fds(sp_relay *r)
{
    while (r->n_fds)
        close(r->fds[--r->n_fds]);
}

static bool is_owned(sp_text name)
{
    for (size_t i = 0; i < sizeof OWNED / sizeof *OWNED; i++)
        if (sp_qmp_is(name, OWNED[i]))
            return true;
    return false;
}

static void pass_to_qemu(sp_relay *r, const char *json, size_t len)
{
    send_all(r->inner, json, len, r->fds, r->n_fds);
    send_all(r->inner, "\n", 1, NULL, 0);
    drop_fds(r);
}

static void ask_receiver(sp_relay *r)
{
    if (r->receiver >= 0 && !r->waiting.sent) {
        tell_receiver(r, SP_FRAME_COMMAND, r->waiting.command.at, r->waiting.command.len);
        r->waiting.sent = 1;
    }
}

static void wait_for(sp_relay *r, int whom, const char *json, size_t len)
{
    r->waiting.whom = whom;
    r->waiting.since_ms = now_ms();
    r->waiting.sent = 0;
    char *copy = sp_bytes_more(&r->waiting.command, len);
    if (copy) {
        memcpy(copy, json, len);
        r->waiting.command.len = len;
    }
}

static void replied(sp_relay *r)
{
    r->waiting.whom = SP_NOBODY;
    r->waiting.negotiates = 0;
    r->waiting.command.len = 0;
}

static void take_command(sp_relay *r, const char *json, size_t len)
{
    sp_text name;
    if (!sp_qmp_member(json, len, "execute", &name)) { /* exec-oob overtakes, as QEMU allows it to */
        sp_text oob;
        if (!sp_qmp_member(json, len, "exec-oob", &oob))
            wait_for(r, SP_QEMU, json, len); /* an error is its reply */
        pass_to_qemu(r, json, len);
        return;
    }
    int owned = !atomic_load(&r->over) && is_owned(name);
    wait_for(r, owned ? SP_RECEIVER : SP_QEMU, json, len);
    r->waiting.negotiates = sp_qmp_is(name, "qmp_capabilities");
    if (owned)
        ask_receiver(r);
    else
        pass_to_qemu(r, json, len);
}

/* Up to a command that has no reply yet. */
static void take_commands(sp_relay *r)
{
    sp_bytes *in = &r->from_client;
    while (r->waiting.whom == SP_NOBODY && in->len) {
        long end = sp_message_end(&r->client_cut, in->at, in->len);
        if (end == 0)
            return;
        if (end < 0) { /* no JSON: QEMU says so, and finds its way again */
            end = (long)in->len;
            r->client_cut = (sp_cut){0};
            pass_to_qemu(r, in->at, (size_t)end);
        } else {
            const char *json = in->at;
            size_t len = (size_t)end;
            while (len && memchr(" \t\r\n", *json, 4)) {
                json++;
                len--;
            }
            take_command(r, json, len);
        }
        sp_bytes_drop(in, (size_t)end);
    }
}

/* --- what QEMU says --- */

static void take_from_qemu(sp_relay *r, const char *json, size_t len)
{
    sp_text value;
    if (sp_qmp_member(json, len, "event", &value)) {
        if (sp_qmp_is(value, "MIGRATION") && !atomic_load(&r->over))
            return;
    } else if (r->waiting.whom == SP_QEMU) {
        bool fine = sp_qmp_member(json, len, "return", &value);
        if (fine || sp_qmp_member(json, len, "error", &value)) {
            r->negotiated |= fine && r->waiting.negotiates;
            replied(r);
        }
    }
    say(r->client, json, len);
}

static void take_all_from_qemu(sp_relay *r)
{
    sp_bytes *in = &r->from_qemu;
    for (long end; in->len && (end = sp_message_end(&r->qemu_cut, in->at, in->len)) != 0;) {
        if (end < 0) {
            end = (long)in->len;
            r->qemu_cut = (sp_cut){0};
            send_all(r->client, in->at, (size_t)end, NULL, 0);
        } else {
            size_t skip = strspn(in->at, " \t\r\n");
            take_from_qemu(r, in->at + skip, (size_t)end - skip);
        }
        sp_bytes_drop(in, (size_t)end);
    }
}

/* --- connections --- */

static void hang_up(sp_relay *r)
{
    pthread_mutex_lock(&r->lock);
    if (r->next_client < 0) /* else it is that one's already */
        atomic_store(&r->outer, -1);
    int client = r->client, inner = r->inner;
    r->client = r->inner = -1;
    pthread_mutex_unlock(&r->lock);
    close(client);
    close(inner);
    r->from_client.len = r->from_qemu.len = 0;
    r->client_cut = r->qemu_cut = (sp_cut){0};
    r->negotiated = 0;
    if (r->waiting.whom == SP_RECEIVER && r->waiting.sent)
        r->stale++;
    replied(r);
    drop_fds(r);
}

static void welcome(sp_relay *r)
{
    uint64_t count;
    if (read(r->wake, &count, sizeof count) < 0 || r->next_client < 0)
        return;
    if (r->client >= 0)
        hang_up(r); /* QEMU has one client at a time */
    pthread_mutex_lock(&r->lock);
    r->client = r->next_client;
    r->inner = r->next_inner;
    r->next_client = r->next_inner = -1;
    pthread_mutex_unlock(&r->lock);
}

static int connect_receiver(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof addr.sun_path)
        return -1;
    strcpy(addr.sun_path, path);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return -1;
    struct ucred peer;
    socklen_t len = sizeof peer;
    /* As for the attach socket: who listens there must be of this user, or root. */
    if (connect(sock, (struct sockaddr *)&addr, sizeof addr) ||
        getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &len) ||
        (peer.uid != geteuid() && peer.uid != 0) || fcntl(sock, F_SETFL, O_NONBLOCK)) {
        close(sock);
        return -1;
    }
    return sock;
}

static void lose_receiver(sp_relay *r)
{
    static const char PAUSED[] = "{\"timestamp\": {\"seconds\": %lld, \"microseconds\": 0}, \"event\": "
                                 "\"MIGRATION\", \"data\": {\"status\": \"postcopy-paused\"}}";
    char text[sizeof PAUSED + 20];
    close(r->receiver);
    r->receiver = -1;
    r->from_receiver.len = 0;
    r->waiting.sent = 0;
    r->waiting.since_ms = now_ms();
    r->stale = 0;
    if (r->guest_runs && r->negotiated) {
        int n = snprintf(text, sizeof text, PAUSED, (long long)time(NULL));
        say(r->client, text, (size_t)n);
        r->told_pause = 1;
    }
    r->guest_runs = 0; /* once for each time: who takes its place may die before it says anything */
}

/* Nobody came who could answer. */
static void refuse(sp_relay *r)
{
    static const char DESC[] = "{\"class\": \"GenericError\", \"desc\": \"the receiver of this guest's "
                               "memory is gone, and no other has taken its place\"}";
    sp_text id;
    char *text = NULL;
    int n = sp_qmp_member(r->waiting.command.at, r->waiting.command.len, "id", &id)
                ? asprintf(&text, "{\"id\": %.*s, \"error\": %s}", (int)id.len, id.at, DESC)
                : asprintf(&text, "{\"error\": %s}", DESC);
    if (n > 0)
        say(r->client, text, (size_t)n);
    free(text);
    replied(r);
}

/* --- the receiver --- */

/* Whoever manages QEMU may go on at once after a pause: another word of it would end that. */
static void pass_event(sp_relay *r, const char *json, size_t len)
{
    static const char RUNS[] = "\"postcopy-active\"", PAUSED[] = "\"postcopy-paused\"";
    int again = r->told_pause && memmem(json, len, PAUSED, sizeof PAUSED - 1);
    r->told_pause = 0;
    r->guest_runs |= memmem(json, len, RUNS, sizeof RUNS - 1) != NULL;
    if (r->negotiated && !again)
        say(r->client, json, len);
}

static void hear_receiver(sp_relay *r, const sp_frame *frame, const char *data)
{
    switch (frame->kind) {
    case SP_FRAME_ANSWER:
        if (r->stale) {
            r->stale--;
        } else if (r->waiting.whom == SP_RECEIVER) {
            say(r->client, data, frame->len);
            replied(r);
        }
        break;
    case SP_FRAME_EVENT:
        pass_event(r, data, frame->len);
        break;
    case SP_FRAME_PING:
        tell_receiver(r, SP_FRAME_PING, NULL, 0);
        break;
    case SP_FRAME_OVER:
        atomic_store(&r->over, 1);
        break;
    default:
        break; /* what newer receivers say */
    }
}

static void hear_all_receiver(sp_relay *r)
{
    sp_bytes *in = &r->from_receiver;
    sp_frame frame;
    while (in->len >= sizeof frame) {
        memcpy(&frame, in->at, sizeof frame);
        if (in->len < sizeof frame + frame.len)
            return;
        hear_receiver(r, &frame, in->at + sizeof frame);
        sp_bytes_drop(in, sizeof frame + frame.len);
    }
}

/* --- reading --- */

static void take_fds(sp_relay *r, struct msghdr *msg)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
            if (r->n_fds < SP_RELAY_MAX_FDS)
                r->fds[r->n_fds++] = fd;
            else
                close(fd);
        }
    }
}

/* 1: something came, or nothing for now; 0: the peer is gone. */
static int read_some(sp_relay *r, int sock, sp_bytes *into, int with_fds)
{
    char space[CMSG_SPACE(sizeof(int) * SP_RELAY_MAX_FDS)];
    struct iovec iov = {.iov_base = sp_bytes_more(into, CHUNK), .iov_len = CHUNK};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (!iov.iov_base || into->len > MOST_PENDING)
        return 0;
    if (with_fds) {
        msg.msg_control = space;
        msg.msg_controllen = sizeof space;
    }
    ssize_t n = syscall(SYS_recvmsg, sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    if (with_fds)
        take_fds(r, &msg);
    into->len += (size_t)n;
    return n > 0;
}

/* --- the end --- */

/* Nobody stands between QEMU and its client any more. */
static bool leave(sp_relay *r)
{
    if (r->waiting.whom != SP_NOBODY || !sp_bytes_blank(&r->from_client) || r->n_fds)
        return false;
    pthread_mutex_lock(&r->lock);
    if (r->client < 0)
        r->left = r->next_client < 0;
    else
        r->parked = atomic_load(&r->outer) >= 0 && r->next_client < 0;
    bool parked = r->parked;
    pthread_mutex_unlock(&r->lock);
    if (!parked)
        return r->left;
    send_all(r->inner, "\n", 1, NULL, 0); /* QEMU comes and reads it */
    struct pollfd pfd = {.fd = r->wake, .events = POLLIN};
    poll(&pfd, 1, -1);
    pthread_mutex_lock(&r->lock);
    r->parked = 0;
    bool left = r->left;
    pthread_mutex_unlock(&r->lock);
    if (left) {
        close(r->client);
        close(r->inner);
    }
    return left;
}

/* --- the thread --- */

static int next_look_ms(const sp_relay *r)
{
    return r->receiver < 0 && !atomic_load(&r->over) ? RETRY_MS : -1;
}

static void look(sp_relay *r)
{
    if (r->receiver < 0 && !atomic_load(&r->over))
        r->receiver = connect_receiver(r->receiver_path);
    if (r->waiting.whom != SP_RECEIVER)
        return;
    ask_receiver(r);
    if (r->receiver < 0 && now_ms() - r->waiting.since_ms > SP_RELAY_PATIENCE_MS)
        refuse(r);
}

static void *run(void *arg)
{
    sp_relay *r = arg;
    for (;;) {
        look(r);
        take_commands(r);
        if (atomic_load(&r->over) && leave(r))
            break;
        struct pollfd fds[] = {{.fd = r->wake, .events = POLLIN},
                               {.fd = r->client, .events = POLLIN},
                               {.fd = r->inner, .events = POLLIN},
                               {.fd = r->receiver, .events = POLLIN}};
        poll(fds, 4, next_look_ms(r));
        if (fds[3].revents) {
            if (read_some(r, r->receiver, &r->from_receiver, 0))
                hear_all_receiver(r);
            else
                lose_receiver(r);
        }
        int alive = 1;
        if (fds[2].revents) {
            alive = read_some(r, r->inner, &r->from_qemu, 0);
            take_all_from_qemu(r);
        }
        if (fds[1].revents && alive)
            alive = read_some(r, r->client, &r->from_client, 1);
        if (!alive)
            hang_up(r);
        if (fds[0].revents)
            welcome(r);
    }
    tell_receiver(r, SP_FRAME_LEFT, NULL, 0);
    if (r->receiver >= 0)
        close(r->receiver);
    return NULL;
}

int sp_relay_start(sp_relay *r, const char *receiver_path)
{
    *r = (sp_relay){.receiver_path = receiver_path, .outer = -1, .next_client = -1,
                    .next_inner = -1, .client = -1, .inner = -1, .receiver = -1};
    pthread_mutex_init(&r->lock, NULL);
    r->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->wake < 0)
        return -errno;
    r->receiver = connect_receiver(receiver_path);
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int err = pthread_create(&thread, NULL, run, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err)
        return -err;
    pthread_setname_np(thread, "sharded-pc-qmp");
    pthread_detach(thread);
    return 0;
}
