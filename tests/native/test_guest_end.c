/* A guest's end of the attach protocol, and its thread, with a receiver that this file plays.  It
 * plays the kernel's userfaultfds, too: what they do is tested from Python.  The argument is a path for
 * the socket. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../../sharded_pc/attach/guest/handle.h"
#include "kernel/uffd.h"
#include "check.h"

enum { SHARDS = 3, STRIPE = 2 << 20, BYTES = 5 * STRIPE + 4096, LONG_MS = 100 };

#define OFFER                                                                                       \
    "{\"geometry\": {\"version\": 1, \"name\": \"g\", \"mode\": \"missing+minor\", \"stripe-size\": " \
    "2097152, \"shards\": 3, \"blocks\": [{\"name\": \"pc \\\"\\u00fc\\\\\", \"size\": 10489856, "   \
    "\"page-size\": 4096, \"first-stripe\": 0}]}}\n"
#define ATTACHED "{\"attached\": {\"guest\": 7}}\n"
#define EVENT(word) "{\"event\": \"" word "\"}\n"

static const char *path;
static int server = -1, ram = -1;
static unsigned registered;

int sp_uffd_open(uint64_t features, int user_only_ok, sp_uffd_info *info)
{
    (void)features, (void)user_only_ok, (void)info;
    return eventfd(0, EFD_CLOEXEC);
}

int sp_uffd_register(int uffd, uint64_t addr, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
    (void)uffd, (void)ioctls;
    CHECK(addr % 4096 == 0 && len && len <= STRIPE && mode == 5);
    registered++;
    return 0;
}

/* --- the receiver --- */

static void listen_there(void)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    memcpy(addr.sun_path, path, strlen(path));
    unlink(path);
    server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(bind(server, (struct sockaddr *)&addr, sizeof addr), 0);
    CHECK_EQ(listen(server, 8), 0);
}

/* Says a text, with the RAM's descriptor if it is an offer; false if the client is gone. */
static int say(int sock, const char *text, int with_ram)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct msghdr msg = {.msg_iov = &(struct iovec){(void *)(uintptr_t)text, strlen(text)},
                         .msg_iovlen = 1};
    memcpy(CMSG_DATA(&control.header), &ram, sizeof ram);
    if (with_ram) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof control;
    }
    return sendmsg(sock, &msg, MSG_NOSIGNAL) == (ssize_t)strlen(text);
}

/* Hears a line; how many descriptors came with it, -1 if the client is gone. */
static int hear(int sock)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(SHARDS * sizeof(int))];
    } control;
    char c = '\0';
    int n = 0;
    while (c != '\n') {
        struct msghdr msg = {.msg_iov = &(struct iovec){&c, 1}, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = sizeof control};
        if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) != 1)
            return -1;
        if (!msg.msg_controllen)
            continue;
        n += (int)((control.header.cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(&control.header) + (size_t)i * sizeof fd, sizeof fd);
            close(fd);
        }
    }
    return n;
}

/* A client that has asked. */
static int meet(void)
{
    int sock = accept4(server, NULL, NULL, SOCK_CLOEXEC);
    CHECK(sock >= 0);
    CHECK_EQ(hear(sock), 0);
    return sock;
}

/* One that has attached.  Who was stopped in the middle may stand before it in the queue. */
static int take_over(void)
{
    for (;;) {
        int sock = meet();
        if (say(sock, OFFER, 1) && hear(sock) == SHARDS && say(sock, ATTACHED, 0))
            return sock;
        close(sock);
    }
}

/* --- the guest --- */

typedef struct guest {
    sp_handle *handle;
    uint8_t *base;
} guest;

typedef int question(const sp_heard *heard);

static int is_offered(const sp_heard *heard)
{
    return heard->offered;
}

static int is_attached(const sp_heard *heard)
{
    return heard->attached;
}

static int is_ready(const sp_heard *heard)
{
    return heard->ready;
}

static int is_completed(const sp_heard *heard)
{
    return heard->completed;
}

static int has_failed(const sp_heard *heard)
{
    return heard->ended || heard->why[0];
}

static sp_heard wait_until(const guest *g, question *is_so)
{
    sp_heard heard;
    for (sp_handle_look(g->handle, &heard); !is_so(&heard); sp_handle_look(g->handle, &heard))
        sp_handle_await(g->handle, heard.news, LONG_MS);
    return heard;
}

static void map_and_join(guest *g, int *sock)
{
    sp_trouble trouble;
    unsigned n;
    size_t len;
    wait_until(g, is_offered);
    CHECK(memcmp(sp_handle_geometry(g->handle, &len), OFFER, strlen(OFFER) - 1) == 0);
    CHECK_EQ(len, strlen(OFFER) - 1);
    int fd = *sp_handle_rights(g->handle, &n);
    CHECK_EQ(n, 1);
    g->base = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(g->base != MAP_FAILED);
    CHECK_EQ(sp_handle_add(g->handle, "'pc.ram'", fd, g->base), 0);
    registered = 0;
    CHECK_EQ(sp_handle_join(g->handle, sp_clock_ns() + 1000000000, &trouble), 0);
    CHECK_EQ(registered, 6);
    CHECK_EQ(hear(*sock), SHARDS);
}

static guest open_guest(int *sock)
{
    guest g = {.handle = sp_handle_new(path)};
    sp_trouble trouble;
    CHECK(g.handle);
    CHECK_EQ(sp_handle_open(g.handle, sp_clock_ns() + 1000000000, &trouble), 0);
    *sock = meet();
    return g;
}

static guest attach_guest(int *sock)
{
    guest g = open_guest(sock);
    say(*sock, OFFER, 1);
    map_and_join(&g, sock);
    say(*sock, ATTACHED, 0);
    CHECK_EQ(wait_until(&g, is_attached).number, 7);
    return g;
}

static void end_guest(guest *g)
{
    sp_handle_stop(g->handle);
    if (g->base)
        munmap(g->base, BYTES);
    sp_handle_close(g->handle);
    sp_handle_free(g->handle);
}

/* --- what is tested --- */

static void test_a_whole_life(void)
{
    int sock;
    guest g = attach_guest(&sock);
    say(sock, EVENT("READY") EVENT("SOMETHING NEW"), 0);
    wait_until(&g, is_ready);
    for (int i = 0; i < 3; i++) {
        close(sock);
        sock = take_over();
    }
    say(sock, "{\"event\": \"FAILED\", \"desc\": \"a \\\"reason\\\"\"}", 0);
    CHECK(strcmp(wait_until(&g, has_failed).why, "the migration failed: a \"reason\"") == 0);
    close(sock);
    sock = take_over();
    say(sock, "{\"event\": \"COMPLETED\", \"huge-pages\": true}", 0);
    sp_heard heard = wait_until(&g, is_completed);
    CHECK(heard.why[0] == '\0' && heard.failures == 1 && !heard.ended);
    close(sock);
    end_guest(&g);
}

static void *await_news(void *arg)
{
    wait_until(arg, is_ready);
    return NULL;
}

/* Others look and wait meanwhile. */
static void test_waiting_threads(void)
{
    pthread_t threads[3];
    int sock;
    guest g = attach_guest(&sock);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, await_news, &g), 0);
    close(sock);
    sock = take_over();
    say(sock, EVENT("READY"), 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    end_guest(&g);
    close(sock);
}

/* Stopped in every step of a hand-over again, and gone on with: it attaches in the end. */
static void test_stops(void)
{
    sp_trouble trouble;
    int sock;
    guest g = attach_guest(&sock);
    for (int step = 0; step < 4; step++) {
        if (step)
            close(sock);
        sock = step > 1 ? meet() : step ? -1 : sock;
        if (step > 2)
            say(sock, OFFER, 1);
        sp_handle_stop(g.handle);
        CHECK_EQ(sp_handle_go_on(g.handle, &trouble), 0);
        if (step == 0)
            continue;
        if (sock >= 0)
            close(sock);
        sock = take_over();
    }
    say(sock, EVENT("COMPLETED"), 0);
    wait_until(&g, is_completed);
    end_guest(&g);
    close(sock);
}

static const char *const REFUSALS[][2] = {
    {"{\"error\": {\"desc\": \"no\"}}", "the receiver refused: no"},
    {"{\"event\": \"FAILED\", \"desc\": \"lost\"}", "the migration failed: lost"},
    {"", "the receiver went away in the middle of the hand-over"},
    {EVENT("COMPLETED"), "the receiver said what the attach protocol does not allow"},
    {ATTACHED, "the receiver said what the attach protocol does not allow"},
    {"[]", "the receiver said what the attach protocol does not allow"},
    {"{\"geometry\": 1}", "the receiver said what the attach protocol does not allow"},
};

static void test_refusals(void)
{
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++) {
        int sock;
        guest g = open_guest(&sock);
        say(sock, REFUSALS[i][0], 0);
        close(sock);
        sp_heard heard = wait_until(&g, has_failed);
        CHECK(heard.ended && strcmp(heard.why, REFUSALS[i][1]) == 0);
        end_guest(&g);
    }
}

/* A message that ends anywhere, in exactly so much memory. */
static void test_cut_messages(void)
{
    const char *whole = OFFER;
    for (size_t len = 1; len < strlen(whole); len++) {
        char *copy = malloc(len);
        sp_message message;
        sp_cut cut = {0};
        CHECK(copy);
        memcpy(copy, whole, len);
        int is_whole = len == strlen(whole) - 1;
        CHECK_EQ(sp_message_end(&cut, copy, len), is_whole ? (long)len : 0);
        CHECK_EQ(sp_message_parse(copy, len, &message), is_whole ? 0 : -1);
        free(copy);
    }
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    CHECK_EQ(argc, 2);
    path = argv[1];
    ram = memfd_create("ram", MFD_CLOEXEC);
    CHECK_EQ(ftruncate(ram, BYTES), 0);
    listen_there();
    int before = dup(0);
    close(before);
    test_a_whole_life();
    test_waiting_threads();
    test_stops();
    test_refusals();
    test_cut_messages();
    int after = dup(0);
    CHECK_EQ(after, before); /* every descriptor is closed */
    unlink(path);
    return 0;
}
