/* A program that maps RAM, in whatever way a test tells it: a line for each thing it does, answered by
 * a line, "ok ..." or "error ERRNO-NAME".  It knows nothing of receivers.
 *
 *   open FILE PATH              a descriptor, of a number FILE
 *   receive FILE SOCKET         the same, sent over a Unix socket
 *   map MAP FILE OFFSET LENGTH HOW   HOW: shared, private, readonly, fixed, populate
 *   where MAP                   its address
 *   unmap MAP OFFSET LENGTH     a part of it, or all
 *   grow MAP                    mremap to twice its length
 *   read MAP OFFSET, write MAP OFFSET BYTE
 *   visit MAP FIRST COUNT BLOCK SEED VERSIONS   pages [FIRST, FIRST + COUNT) of the block, in random order,
 *                               by several threads, are as the file of versions says (oracle.h)
 *   save MAP OFFSET LENGTH PATH   write(2) of it: the kernel reads
 *   load MAP OFFSET LENGTH PATH   read(2) into it: the kernel writes
 *   uffds                       how many userfaultfds are open
 *   fork                        a child obeys from now on
 *   jail FOLDER                 another root, other namespaces, no way to open sockets or devices
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lab/oracle.h"

enum { PAGE = 4096, MOST = 16, THREADS = 3 };

typedef struct mapping {
    uint8_t *at;
    size_t len;
    uint64_t offset;
} mapping;

static int files[MOST];
static mapping maps[MOST];

static int fail(void)
{
    printf("error %s\n", strerrorname_np(errno));
    return 0;
}

static int done(int good)
{
    return good ? printf("ok\n") : fail();
}

static uint64_t number(const char *text)
{
    return strtoull(text, NULL, 0);
}

static int receive(int *fd, const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    char byte;
    struct msghdr msg = {.msg_iov = &(struct iovec){&byte, 1}, .msg_iovlen = 1,
                         .msg_control = &control, .msg_controllen = sizeof control};
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(addr.sun_path, sizeof addr.sun_path, "%s", path);
    if (connect(sock, (struct sockaddr *)&addr, sizeof addr) || recvmsg(sock, &msg, 0) != 1)
        return fail();
    memcpy(fd, CMSG_DATA(&control.header), sizeof *fd);
    close(sock);
    return printf("ok %s\n", fcntl(*fd, F_GETFL) & O_PATH ? "token" : "real");
}

static int map(mapping *m, int fd, uint64_t offset, size_t len, const char *how)
{
    int prot = PROT_READ | (strcmp(how, "readonly") ? PROT_WRITE : 0);
    int flags = strcmp(how, "private") ? MAP_SHARED : MAP_PRIVATE;
    void *room = NULL;
    if (strcmp(how, "fixed") == 0) {
        room = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        flags |= MAP_FIXED;
    } else if (strcmp(how, "populate") == 0) {
        flags |= MAP_POPULATE;
    }
    void *at = mmap(room, len, prot, flags, fd, (off_t)offset);
    if (at == MAP_FAILED)
        return fail();
    *m = (mapping){at, len, offset};
    return done(1);
}

typedef struct look {
    const mapping *map;
    uint64_t seed, first, count;
    uint32_t block;
    const uint8_t *versions;
    uint64_t wrong; /* page + 1 */
} look;

static void *visit(void *arg)
{
    look *l = arg;
    unsigned short state[3] = {1, 2, (unsigned short)l->first};
    uint64_t *order = malloc(l->count * sizeof *order);
    for (size_t i = 0; i < l->count; i++) {
        size_t j = (size_t)nrand48(state) % (i + 1);
        order[i] = order[j];
        order[j] = l->first + i;
    }
    size_t right = sp_guest_visit(l->map->at - l->map->offset, l->seed, l->block, order, l->count,
                                  l->versions, NULL, NULL);
    l->wrong = right < l->count ? order[right] + 1 : 0;
    free(order);
    return NULL;
}

static int visit_all(char **w)
{
    static uint8_t versions[1 << 20];
    pthread_t threads[THREADS];
    look looks[THREADS];
    int fd = open(w[5], O_RDONLY);
    if (fd < 0 || read(fd, versions, sizeof versions) < 0)
        return fail();
    close(fd);
    for (int i = 0; i < THREADS; i++) {
        looks[i] = (look){&maps[number(w[0])], number(w[4]), number(w[1]), number(w[2]),
                          (uint32_t)number(w[3]), versions, 0};
        if (pthread_create(&threads[i], NULL, visit, &looks[i]))
            return fail();
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        if (looks[i].wrong)
            return printf("wrong page %" PRIu64 "\n", looks[i].wrong - 1);
    }
    return done(1);
}

static int move(const char *word, const mapping *m, uint64_t offset, size_t len, const char *path)
{
    int save = strcmp(word, "save") == 0;
    int fd = open(path, save ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0600);
    if (fd < 0)
        return fail();
    ssize_t n = save ? write(fd, m->at + offset, len) : read(fd, m->at + offset, len);
    close(fd);
    return n < 0 ? fail() : printf("ok %zd\n", n);
}

static int count_uffds(void)
{
    char link[300], target[64];
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    for (struct dirent *e; dir && (e = readdir(dir));) {
        snprintf(link, sizeof link, "/proc/self/fd/%s", e->d_name);
        ssize_t n = readlink(link, target, sizeof target - 1);
        target[n > 0 ? n : 0] = '\0';
        count += strstr(target, "userfaultfd") != NULL;
    }
    closedir(dir);
    return printf("ok %d\n", count);
}

static int fork_away(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid > 0) {
        int status;
        waitpid(pid, &status, 0);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    return done(pid == 0);
}

/* What sandboxes of back-ends forbid: then a call of theirs would be the end of the process. */
static int jail(const char *folder)
{
    static const int forbidden[] = {SYS_socket, SYS_connect, SYS_ioctl, SYS_userfaultfd, SYS_open,
                                    SYS_openat, SYS_socketpair, SYS_poll, SYS_readlink, SYS_dup2,
                                    SYS_dup3, SYS_getsockopt, SYS_kill, SYS_execve};
    enum { N = sizeof forbidden / sizeof *forbidden };
    struct sock_filter code[N + 3] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
    for (unsigned i = 0; i < N; i++)
        code[1 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                                   (unsigned)forbidden[i], (unsigned char)(N - i), 0);
    code[N + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[N + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    struct sock_fprog program = {N + 3, code};
    if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC) || chroot(folder) || chdir("/"))
        return fail();
    fflush(stdout);
    return done(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
                !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static int act(char **w, int n)
{
    const char *word = w[0];
    mapping *m = n > 1 ? &maps[number(w[1]) % MOST] : NULL;
    if (strcmp(word, "uffds") == 0)
        return count_uffds();
    if (strcmp(word, "fork") == 0)
        return fork_away();
    if (strcmp(word, "jail") == 0)
        return jail(w[1]);
    if (strcmp(word, "open") == 0)
        return done((files[number(w[1])] = open(w[2], O_RDWR | O_CLOEXEC)) >= 0);
    if (strcmp(word, "receive") == 0)
        return receive(&files[number(w[1])], w[2]);
    if (strcmp(word, "map") == 0)
        return map(m, files[number(w[2])], number(w[3]), number(w[4]), w[5]);
    if (strcmp(word, "where") == 0)
        return printf("ok %" PRIuPTR "\n", (uintptr_t)m->at);
    if (strcmp(word, "unmap") == 0)
        return done(munmap(m->at + number(w[2]), number(w[3])) == 0);
    if (strcmp(word, "grow") == 0)
        return done(mremap(m->at, m->len, m->len * 2, MREMAP_MAYMOVE) != MAP_FAILED);
    if (strcmp(word, "read") == 0)
        return printf("ok %u\n", m->at[number(w[2])]);
    if (strcmp(word, "write") == 0)
        return m->at[number(w[2])] = (uint8_t)number(w[3]), done(1);
    if (strcmp(word, "visit") == 0)
        return visit_all(w + 1);
    if (strcmp(word, "save") == 0 || strcmp(word, "load") == 0)
        return move(word, m, number(w[2]), number(w[3]), w[4]);
    return printf("unknown word %s\n", word);
}

int main(void)
{
    char line[1024], *words[16];
    setvbuf(stdout, NULL, _IOLBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0); /* a child goes on where its parent stopped */
    while (fgets(line, sizeof line, stdin)) {
        int n = 0;
        for (char *word = strtok(line, " \n"); word && n < 15; word = strtok(NULL, " \n"))
            words[n++] = word;
        words[n] = NULL;
        if (n)
            act(words, n);
    }
    return 0;
}
