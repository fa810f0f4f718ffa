/* A process for the preload library: does what its arguments say, one after the other.
 *
 *   fixed|plain|mmap64|readonly|half|private PATH   map a file, the way a word says
 *   anonymous            map memory of its own, malloc some more, write and read both
 *   fork-map PATH        a child maps the file; prints the child's exit code
 *   environ              a child prints its environment
 *   visit BLOCK SEED VERSIONS   every page of the last mapping, in random order, is as the file of
 *                        versions says (one byte for each page; oracle.h)
 *   read OFFSET          prints a byte of the last mapping
 *   punch|remove|dontneed OFFSET   drops a page of the last mapping, the way a word says
 *   fork-read OFFSET     prints the byte that a child reads there, or the signal that ends it
 *   share                hands the last file to somebody by SCM_RIGHTS; prints how that can map it
 *   flags                prints what the kernel does with the last mapping: hg nh dc (smaps)
 *   dofork               undoes what `map` asked for
 *   addresses            prints where the files are mapped, in order
 *   uffds                prints how many userfaultfds are open
 *   no-uffds             waits until none is open
 *   say WORD, wait       prints a word; reads a line
 *
 * It knows nothing of the library.  Exit code 1 and a line on stderr if something is wrong.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lab/oracle.h"

enum { PAGE = 4096, ALLOCATIONS = 64, ALLOCATION = 1 << 20, MAX_MAPPINGS = 16 };

static uint8_t *mappings[MAX_MAPPINGS];
static size_t n_mappings, last_size;
static int last_fd = -1;

static void ensure(int good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "preload_client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint8_t *last(void)
{
    ensure(n_mappings > 0, "nothing is mapped");
    return mappings[n_mappings - 1];
}

/* As QEMU does: a reservation with a guard page, and the file over it. */
static void *map_fixed(int fd, size_t size)
{
    uint8_t *room = mmap(NULL, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ensure(room != MAP_FAILED, "reserve");
    return mmap(room, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
}

static void *map_as(const char *how, int fd, size_t size)
{
    int both = PROT_READ | PROT_WRITE;
    if (strcmp(how, "fixed") == 0)
        return map_fixed(fd, size);
    if (strcmp(how, "mmap64") == 0)
        return mmap64(NULL, size, both, MAP_SHARED, fd, 0);
    if (strcmp(how, "readonly") == 0)
        return mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (strcmp(how, "half") == 0)
        return mmap(NULL, size / 2, both, MAP_SHARED, fd, 0);
    if (strcmp(how, "private") == 0)
        return mmap(NULL, size, both, MAP_PRIVATE, fd, 0);
    return mmap(NULL, size, both, MAP_SHARED, fd, 0);
}

static void map_file(const char *how, const char *path)
{
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    ensure(fd >= 0 && fstat(fd, &st) == 0, path);
    last_size = (size_t)st.st_size;
    void *at = map_as(how, fd, last_size);
    ensure(at != MAP_FAILED && n_mappings < MAX_MAPPINGS, path);
    mappings[n_mappings++] = at;
    /* QEMU does this to its RAM right afterwards. */
    madvise(at, last_size, MADV_HUGEPAGE);
    madvise(at, last_size, MADV_DONTFORK);
    if (last_fd >= 0)
        close(last_fd);
    last_fd = fd;
}

static void drop(const char *how, size_t offset)
{
    int rc = -1;
    if (strcmp(how, "punch") == 0)
        rc = fallocate(last_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, PAGE);
    else
        rc = madvise(last() + offset, PAGE, strcmp(how, "remove") ? MADV_DONTNEED : MADV_REMOVE);
    ensure(rc == 0, how);
}

static void fork_and_read(size_t offset)
{
    int status = -1;
    pid_t pid = fork();
    if (pid == 0)
        _exit(last()[offset]);
    waitpid(pid, &status, 0);
    if (WIFSIGNALED(status))
        printf("signal %d\n", WTERMSIG(status));
    else
        printf("child read %d\n", WEXITSTATUS(status));
}

static void share(void)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    char byte = 'x';
    struct msghdr msg = {.msg_iov = &(struct iovec){&byte, 1}, .msg_iovlen = 1,
                         .msg_control = &control, .msg_controllen = sizeof control};
    struct stat st, theirs;
    int pair[2], fd;
    memcpy(CMSG_DATA(&control.header), &last_fd, sizeof last_fd);
    ensure(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
    ensure(sendmsg(pair[0], &msg, 0) == 1, "sendmsg");
    memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
    ensure(fd == last_fd, "the message is not the caller's any more");
    ensure(recvmsg(pair[1], &msg, 0) == 1, "recvmsg");
    memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
    ensure(fstat(last_fd, &st) == 0 && fstat(fd, &theirs) == 0, "fstat");
    ensure(st.st_ino == theirs.st_ino, "another file");
    void *at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    puts(at == MAP_FAILED ? strerror(errno) : "mapped");
    close(pair[0]);
    close(pair[1]);
}

static void show_flags(void)
{
    static const char *const names[] = {"hg", "nh", "dc"};
    char line[512], start[32];
    FILE *smaps = fopen("/proc/self/smaps", "re");
    int here = 0;
    ensure(smaps != NULL, "smaps");
    snprintf(start, sizeof start, "%" PRIxPTR "-", (uintptr_t)last());
    while (fgets(line, sizeof line, smaps)) {
        here |= strncmp(line, start, strlen(start)) == 0;
        if (!here || strncmp(line, "VmFlags:", 8) != 0)
            continue;
        printf("flags");
        for (size_t i = 0; i < 3; i++)
            printf("%s%s", strstr(line, names[i]) ? " " : "", strstr(line, names[i]) ? names[i] : "");
        putchar('\n');
        break;
    }
    fclose(smaps);
}

static void use_anonymous(void)
{
    uint8_t *own = mmap(NULL, ALLOCATION, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                        0);
    ensure(own != MAP_FAILED, "mmap");
    for (int i = 0; i < ALLOCATIONS; i++) {
        uint8_t *more = malloc(ALLOCATION);
        ensure(more != NULL, "malloc");
        memset(more, i, ALLOCATION);
        memcpy(own, more, ALLOCATION);
        ensure(own[i] == i, "memory");
        free(more);
    }
    munmap(own, ALLOCATION);
}

static int child_code(pid_t pid)
{
    int status = -1;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void fork_and_map(const char *path)
{
    pid_t pid = fork();
    if (pid == 0) {
        map_file("plain", path);
        _exit(0);
    }
    printf("child %d\n", child_code(pid));
}

static void show_environment(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        execlp("env", "env", (char *)NULL);
        _exit(1);
    }
    ensure(child_code(pid) == 0, "env");
}

static uint8_t *load(const char *path, size_t *size)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ensure(fd >= 0 && fstat(fd, &st) == 0, path);
    *size = (size_t)st.st_size;
    uint8_t *data = malloc(*size);
    ensure(data && read(fd, data, *size) == st.st_size, path);
    close(fd);
    return data;
}

static void visit(uint32_t block, uint64_t seed, const char *path)
{
    size_t n;
    uint8_t *versions = load(path, &n);
    uint64_t *order = malloc(n * sizeof *order);
    unsigned short state[3] = {1, 2, (unsigned short)block};
    ensure(order && n * PAGE == last_size, path);
    for (size_t i = 0; i < n; i++) {
        size_t j = (size_t)nrand48(state) % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    size_t right = sp_guest_visit(last(), seed, block, order, n, versions, NULL, NULL);
    if (right < n) {
        fprintf(stderr, "preload_client: page %" PRIu64 " of block %u is not version %d\n",
                order[right], block, versions[order[right]]);
        exit(1);
    }
    printf("visited %zu\n", right);
    free(order);
    free(versions);
}

static int count_uffds(void)
{
    char link[64], target[256];
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    ensure(dir != NULL, "/proc/self/fd");
    for (struct dirent *entry; (entry = readdir(dir));) {
        snprintf(link, sizeof link, "/proc/self/fd/%.20s", entry->d_name);
        ssize_t n = readlink(link, target, sizeof target - 1);
        target[n > 0 ? n : 0] = '\0';
        count += strstr(target, "userfaultfd") != NULL;
    }
    closedir(dir);
    return count;
}

static void show_addresses(void)
{
    for (size_t i = 0; i < n_mappings; i++)
        printf("%s%" PRIuPTR, i ? " " : "", (uintptr_t)mappings[i]);
    putchar('\n');
}

static void wait_line(void)
{
    int c = getchar();
    while (c != '\n' && c != EOF)
        c = getchar();
}

/* Does what argv[0] says; how many arguments that took. */
static int act(char **argv)
{
    const char *word = argv[0];
    if (strcmp(word, "anonymous") == 0)
        return use_anonymous(), 1;
    if (strcmp(word, "environ") == 0)
        return show_environment(), 1;
    if (strcmp(word, "addresses") == 0)
        return show_addresses(), 1;
    if (strcmp(word, "uffds") == 0)
        return printf("uffds %d\n", count_uffds()), 1;
    if (strcmp(word, "wait") == 0)
        return wait_line(), 1;
    if (strcmp(word, "share") == 0)
        return share(), 1;
    if (strcmp(word, "flags") == 0)
        return show_flags(), 1;
    if (strcmp(word, "dofork") == 0)
        return madvise(last(), last_size, MADV_DOFORK), 1;
    if (strcmp(word, "no-uffds") == 0) {
        while (count_uffds())
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        return 1;
    }
    ensure(argv[1] != NULL, word);
    if (strcmp(word, "say") == 0)
        return puts(argv[1]), 2;
    if (strcmp(word, "read") == 0)
        return printf("%u\n", last()[strtoull(argv[1], NULL, 0)]), 2;
    if (strcmp(word, "fork-read") == 0)
        return fork_and_read(strtoull(argv[1], NULL, 0)), 2;
    if (strcmp(word, "punch") == 0 || strcmp(word, "remove") == 0 || strcmp(word, "dontneed") == 0)
        return drop(word, strtoull(argv[1], NULL, 0)), 2;
    if (strcmp(word, "fork-map") == 0)
        return fork_and_map(argv[1]), 2;
    if (strcmp(word, "visit") == 0) {
        ensure(argv[2] && argv[3], word);
        return visit((uint32_t)atoi(argv[1]), strtoull(argv[2], NULL, 10), argv[3]), 4;
    }
    return map_file(word, argv[1]), 2;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc;)
        i += act(argv + i);
    return 0;
}
