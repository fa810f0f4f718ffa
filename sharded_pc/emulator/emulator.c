/* sharded-pc-emulator: started in QEMU's place, with QEMU's arguments, by libvirt or anybody.
 *
 * Without -incoming it becomes QEMU at once.  With it, it starts a receiver (`sharded-pc emulate`)
 * beside itself, and then becomes QEMU too, in place: QEMU has the process number, descriptors,
 * limits, cgroup and namespaces that this program was given, and no child that it does not know.
 *
 * Settings stand in /etc/sharded-pc.toml and in sharded-pc.toml beside this program, whose keys count
 * more; libvirt wipes the environment.  Of them it reads three: `qemu`, `receiver`, `strict`; all of
 * them are the receiver's (emulator/settings.py).
 *
 * The receiver answers on a pipe, in texts that end with NUL; the first byte says what each is:
 *   e  VARIABLE=VALUE for QEMU's environment
 *   a  an argument for QEMU
 *   m  why it cannot serve this guest: QEMU takes the migration by itself (or, `strict`, nobody does)
 *   .  the last one
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXIT_FAILED = 1, ANSWER_MS = 60000, ANSWER_ROOM = 4 << 20, DEATHS_MOST = 5, STREAMS_MOST = 8 };

#define DEFAULT_QEMU "qemu-system-x86_64"
#define SETTINGS "sharded-pc.toml"

typedef struct settings {
    char qemu[PATH_MAX], receiver[PATH_MAX];
    bool strict;
} settings;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    size_t len = n < 0 ? 0 : (size_t)n < sizeof line - 2 ? (size_t)n : sizeof line - 2;
    line[len++] = '\n';
    if (write(STDERR_FILENO, line, len) < 0)
        return; /* nobody to tell */
}

/* --- settings --- */

/* `key = "value"` or `key = true` of TOML's first table, whose other lines are none of ours. */
static bool value_of(const char *line, const char *key, char *value, size_t room)
{
    size_t len = strlen(key);
    line += strspn(line, " \t");
    if (strncmp(line, key, len) != 0)
        return false;
    line += len + strspn(line + len, " \t");
    if (*line++ != '=')
        return false;
    line += strspn(line, " \t");
    char quote = *line == '"' || *line == '\'' ? *line++ : '\0';
    const char ends[] = {quote ? quote : ' ', '\n', '\0'};
    size_t n = strcspn(line, quote ? ends : " \t\r\n#");
    if (n >= room)
        return false;
    memcpy(value, line, n);
    value[n] = '\0';
    return true;
}

static void read_settings(const char *path, settings *s)
{
    char line[PATH_MAX + 64], word[PATH_MAX];
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file) && line[0] != '[') {
        if (value_of(line, "qemu", word, sizeof word))
            strcpy(s->qemu, word);
        if (value_of(line, "receiver", word, sizeof word))
            strcpy(s->receiver, word);
        if (value_of(line, "strict", word, sizeof word))
            s->strict = strcmp(word, "true") == 0;
    }
    if (file)
        fclose(file);
}

/* The folder that this program was started from, then the one where its file really is. */
static void folders(const char *argv0, char *invoked, char *real)
{
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    path[n < 0 ? 0 : n] = '\0';
    strcpy(real, dirname(path));
    if (argv0[0] == '/' && strlen(argv0) < PATH_MAX) {
        strcpy(path, argv0);
        strcpy(invoked, dirname(path));
    } else
        strcpy(invoked, real);
}

static const char *joined(char *into, const char *folder, const char *name)
{
    snprintf(into, PATH_MAX, "%.*s/%s", PATH_MAX - 64, folder, name);
    return into;
}

static void find(const char *invoked, const char *real, settings *s)
{
    char path[PATH_MAX];
    strcpy(s->qemu, DEFAULT_QEMU);
    read_settings("/etc/" SETTINGS, s);
    read_settings(joined(path, invoked, SETTINGS), s);
    if (!*s->receiver && access(joined(path, invoked, "sharded-pc"), X_OK) == 0)
        strcpy(s->receiver, path);
    if (!*s->receiver)
        strcpy(s->receiver, joined(path, real, "sharded-pc"));
}

/* --- QEMU --- */

static const char *incoming_of(char **argv)
{
    for (; *argv; argv++)
        if (strcmp(*argv, "-incoming") == 0 || strcmp(*argv, "--incoming") == 0)
            return argv[1] ? argv[1] : "";
    return NULL;
}

__attribute__((noreturn)) static void become(const char *qemu, char **argv)
{
    argv[0] = (char *)(uintptr_t)qemu;
    execvp(qemu, argv);
    say("sharded-pc: start QEMU %s: %s; name it in " SETTINGS ": qemu = \"/path\"", qemu,
        strerror(errno));
    _exit(EXIT_FAILED);
}

/* --- the receiver --- */

/* With -incoming fd:N, that one; -1. */
static int stream_of(const char *incoming)
{
    int fd;
    char more;
    return sscanf(incoming, "fd:%d%c", &fd, &more) == 1 && fd > STDERR_FILENO ? fd : -1;
}

static void close_between(unsigned from, unsigned to)
{
    if (from <= to)
        syscall(SYS_close_range, from, to, 0);
}

/* In the receiver's processes: all but what they need is QEMU's. */
static void close_others(const int *kept, size_t n)
{
    unsigned from = 3;
    for (size_t i = 0; i < n; i++) /* ascending */
        if (kept[i] >= (int)from) {
            close_between(from, (unsigned)kept[i] - 1);
            from = (unsigned)kept[i] + 1;
        }
    close_between(from, UINT_MAX);
}

/* Is the descriptor one that QEMU's arguments give to something: fd=26, vhostfds=30:31, "str":"26"? */
static bool is_named(int fd, char **argv)
{
    char number[16];
    int len = snprintf(number, sizeof number, "%d", fd);
    for (; *argv; argv++) {
        if (!strstr(*argv, "fd"))
            continue;
        for (const char *at = *argv; (at = strstr(at, number)); at++)
            if (at > *argv && strchr("=:\"", at[-1]) && !isdigit((unsigned char)at[len]))
                return true;
    }
    return false;
}

/* Descriptors that the migration may come by: -incoming fd:N, else those that can be read and that no
 * argument says a use of, for which `migrate-incoming fd:N` may come (libvirt's restore, and its tunnel).
 * Those stay QEMU's too: somebody may count on it (libvirt on the lock of its pid file). */
static size_t find_streams(const char *incoming, char **argv, int *fds)
{
    size_t n = 0;
    if (stream_of(incoming) >= 0) {
        fds[0] = stream_of(incoming);
        return 1;
    }
    DIR *dir = opendir("/proc/self/fd");
    struct stat st;
    for (struct dirent *each; dir && n < STREAMS_MOST && (each = readdir(dir));) {
        int fd = atoi(each->d_name); /* ".", "..": standard input, as good as none */
        if (fd <= STDERR_FILENO || fcntl(fd, F_GETFD) & FD_CLOEXEC ||
            (fcntl(fd, F_GETFL) & O_ACCMODE) == O_WRONLY || fstat(fd, &st))
            continue;
        if ((S_ISREG(st.st_mode) || S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode)) &&
            !is_named(fd, argv))
            fds[n++] = fd;
    }
    if (dir)
        closedir(dir);
    return n;
}

static int by_number(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

typedef struct place {
    const settings *s;
    const char *folder; /* of the settings */
    pid_t qemu;         /* its number, now or to be */
    int pidfd;          /* of the same */
    char **argv;
    int argc;
    int *streams; /* descriptors that the migration may come by */
    size_t n_streams;
} place;

static void close_streams(place *p)
{
    while (p->n_streams)
        close(p->streams[--p->n_streams]);
}

/* `sharded-pc emulate` as a child; its number, or -1.  Without a pipe for its answer (-1) it takes a
 * dead one's place. */
static pid_t spawn_receiver(const place *p, int answer)
{
    char pid[32], fd[32], streams[STREAMS_MOST * 12 + 1] = "";
    const char *first[] = {p->s->receiver, "emulate", "--settings", p->folder, "--pid", pid,
                           "--answer-fd", fd, "--stream-fds", streams, "--", p->s->qemu};
    size_t n = sizeof first / sizeof *first;
    snprintf(pid, sizeof pid, "%d", p->qemu);
    snprintf(fd, sizeof fd, "%d", answer);
    for (size_t i = 0, at = 0; i < p->n_streams; i++)
        at += (size_t)snprintf(streams + at, sizeof streams - at, at ? ",%d" : "%d", p->streams[i]);
    pid_t child = fork();
    if (child)
        return child;
    const char **words = calloc(n + (size_t)p->argc, sizeof *words);
    if (!words)
        _exit(EXIT_FAILED);
    memcpy(words, first, sizeof first);
    memcpy(words + n, p->argv + 1, (size_t)p->argc * sizeof *words); /* with its NULL */
    if (answer >= 0)
        fcntl(answer, F_SETFD, 0);
    execv(p->s->receiver, (char **)(uintptr_t)words);
    say("sharded-pc: start %s: %s", p->s->receiver, strerror(errno));
    _exit(EXIT_FAILED);
}

/* Notices a receiver's death, of which QEMU's guest may be in need of another; as long as that takes.
 * One that ends by itself has said why. */
__attribute__((noreturn)) static void supervise(place *p, int answer)
{
    int kept[STREAMS_MOST + 2] = {answer, p->pidfd}, status;
    memcpy(kept + 2, p->streams, p->n_streams * sizeof *kept);
    qsort(kept, p->n_streams + 2, sizeof *kept, by_number);
    close_others(kept, p->n_streams + 2);
    for (int deaths = 0; deaths < DEATHS_MOST; deaths++) {
        pid_t receiver = spawn_receiver(p, answer);
        if (answer >= 0)
            close(answer);
        answer = -1;
        close_streams(p);
        struct pollfd qemu = {.fd = p->pidfd, .events = POLLIN};
        if (receiver < 0 || waitpid(receiver, &status, 0) < 0 || !WIFSIGNALED(status) ||
            poll(&qemu, 1, 0) > 0)
            break;
        say("sharded-pc: the receiver was killed by signal %d, another one takes its place",
            WTERMSIG(status));
    }
    _exit(0);
}

/* The answer's end of a pipe, or -1 and errno.  Forked twice: QEMU gets no child. */
static int start_receiver(place *p)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return -1;
    pid_t middle = fork();
    if (middle == 0) {
        setsid();
        pid_t supervisor = fork();
        if (supervisor)
            _exit(supervisor < 0);
        supervise(p, ends[1]);
    }
    close(ends[1]);
    int status = -1;
    if (middle < 0 || waitpid(middle, &status, 0) < 0 || status) {
        errno = EAGAIN;
        close(ends[0]);
        return -1;
    }
    return ends[0];
}

/* What it says, up to its end; 0 if that did not come. */
static size_t hear(int from, char *text)
{
    size_t len = 0;
    struct pollfd pfd = {.fd = from, .events = POLLIN};
    while (len < ANSWER_ROOM && poll(&pfd, 1, ANSWER_MS) > 0) {
        ssize_t n = read(from, text + len, ANSWER_ROOM - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        len += (size_t)n;
        if (len >= 2 && text[len - 2] == '.' && text[len - 1] == '\0' &&
            (len == 2 || text[len - 3] == '\0'))
            return len;
    }
    return 0;
}

__attribute__((noreturn)) static void stand_aside(const settings *s, const char *why, char **argv)
{
    if (s->strict) {
        say("sharded-pc: no migration without a receiver (strict): %s", why);
        _exit(EXIT_FAILED);
    }
    say("sharded-pc: stands aside, QEMU takes the migration by itself: %s", why);
    become(s->qemu, argv);
}

static void obey(const settings *s, char *text, size_t len, char **argv)
{
    char **words = calloc(len, sizeof *words);
    int n = 0;
    for (char *at = text; words && at < text + len; at += strlen(at) + 1) {
        if (*at == 'm')
            stand_aside(s, at + 1, argv);
        if (*at == 'e')
            putenv(at + 1);
        if (*at == 'a')
            words[n++] = at + 1;
    }
    if (!n)
        stand_aside(s, "the receiver's answer cannot be read", argv);
    become(s->qemu, words);
}

int main(int argc, char **argv)
{
    char invoked[PATH_MAX], real[PATH_MAX];
    static settings s;
    folders(argv[0], invoked, real);
    find(invoked, real, &s);
    const char *incoming = incoming_of(argv + 1);
    if (!incoming)
        become(s.qemu, argv);
    char *text = malloc(ANSWER_ROOM);
    int streams[STREAMS_MOST];
    place p = {&s, invoked, getpid(), (int)syscall(SYS_pidfd_open, getpid(), 0), argv, argc, streams,
               find_streams(incoming, argv, streams)};
    int from = text && p.pidfd >= 0 ? start_receiver(&p) : -1;
    close(p.pidfd);
    if (from < 0)
        stand_aside(&s, strerror(errno), argv);
    size_t len = hear(from, text);
    close(from);
    if (!len)
        stand_aside(&s, "the receiver has ended, or hangs (its message may stand above)", argv);
    if (text[0] != 'm' && stream_of(incoming) >= 0)
        close_streams(&p); /* the receiver has it */
    obey(&s, text, len, argv);
}
