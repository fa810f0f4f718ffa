#define _GNU_SOURCE
#include "handle.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../native/shared/bell.h"
#include "guest.h"

struct sp_handle {
    sp_guest guest; /* first: the thread is told of nothing else */
    pid_t owner;    /* whose thread it is */
    int following;  /* there is a thread to be joined */
    sp_bell bell;
    pthread_mutex_t lock; /* of `heard`; the thread writes */
    sp_heard heard;
};

static void note_failure(sp_heard *heard, const char *why)
{
    if (strcmp(heard->why, why) == 0)
        return; /* said, and then the socket closed */
    snprintf(heard->why, sizeof heard->why, "%s", why);
    heard->failures++;
}

static void tell(sp_guest *guest, sp_news news, const char *why)
{
    sp_handle *handle = (sp_handle *)guest;
    sp_heard *heard = &handle->heard;
    pthread_mutex_lock(&handle->lock);
    heard->number = guest->number;
    heard->offered |= news == SP_NEWS_OFFERED;
    heard->attached |= news == SP_NEWS_ATTACHED || news == SP_NEWS_COMPLETED;
    heard->ready |= news == SP_NEWS_READY || news == SP_NEWS_COMPLETED;
    heard->completed |= news == SP_NEWS_COMPLETED;
    heard->ended |= news == SP_NEWS_ENDED;
    if (news == SP_NEWS_ATTACHED)
        heard->why[0] = '\0';
    if (why)
        note_failure(heard, why);
    pthread_mutex_unlock(&handle->lock);
    sp_bell_ring(&handle->bell);
}

static const sp_guest_kind KIND = {.who = "sharded_pc guest", .tell = tell};

sp_handle *sp_handle_new(const char *socket_path)
{
    sp_handle *handle = calloc(1, sizeof *handle);
    if (!handle)
        return NULL;
    handle->owner = getpid();
    handle->guest.kind = &KIND;
    handle->guest.number = -1;
    handle->guest.memory.user_only_ok = 1;
    handle->guest.socket_path = strdup(socket_path);
    pthread_mutex_init(&handle->lock, NULL);
    handle->guest.channel.sock = handle->guest.channel.stop = -1;
    if (handle->guest.socket_path)
        return handle;
    sp_handle_free(handle);
    return NULL;
}

void sp_handle_free(sp_handle *handle)
{
    sp_memory *memory = &handle->guest.memory;
    if (handle->following)
        return; /* the program ends: so will the thread */
    for (unsigned i = 0; i < memory->n_segments; i++)
        free(memory->segments[i].path);
    free(memory->segments);
    free(handle->guest.socket_path);
    free(handle);
}

void sp_handle_close(sp_handle *handle)
{
    sp_channel_deinit(&handle->guest.channel);
    sp_memory_close(&handle->guest.memory);
    handle->following = 0; /* there is none in a forked child */
    sp_bell_ring(&handle->bell);
}

static int listen_on(sp_handle *handle, sp_trouble *trouble)
{
    handle->following = sp_guest_follow(&handle->guest, trouble) == 0;
    return handle->following ? 0 : -1;
}

int sp_handle_open(sp_handle *handle, uint64_t deadline, sp_trouble *trouble)
{
    int rc = sp_channel_init(&handle->guest.channel, 1);
    if (rc < 0)
        return sp_fail_as(trouble, SP_CAUSE_HOST, "make an eventfd: %s", strerror(-rc));
    if (sp_guest_open(&handle->guest, deadline, trouble))
        return -1;
    return listen_on(handle, trouble);
}

const char *sp_handle_geometry(sp_handle *handle, size_t *len)
{
    *len = handle->guest.channel.used;
    return handle->guest.channel.buf;
}

const int *sp_handle_rights(sp_handle *handle, unsigned *n)
{
    *n = handle->guest.channel.n_rights;
    return handle->guest.channel.rights;
}

int sp_handle_add(sp_handle *handle, const char *name, int fd, uint8_t *base)
{
    sp_memory *memory = &handle->guest.memory;
    sp_segment segment = {.base = base, .path = NULL};
    struct stat st;
    if (fstat(fd, &st))
        return -errno;
    segment.dev = st.st_dev;
    segment.ino = st.st_ino;
    segment.size = (uint64_t)st.st_size;
    sp_segment *more = realloc(memory->segments, (memory->n_segments + 1) * sizeof segment);
    if (more)
        memory->segments = more;
    if (!more || asprintf(&segment.path, "block %s", name) < 0)
        return -ENOMEM;
    memory->segments[memory->n_segments++] = segment;
    return 0;
}

int sp_handle_join(sp_handle *handle, uint64_t deadline, sp_trouble *trouble)
{
    sp_channel *channel = &handle->guest.channel;
    sp_message geometry;
    sp_handle_stop(handle); /* it has ended: the message is ours */
    if (sp_message_parse(channel->buf, channel->used, &geometry))
        return sp_fail(trouble, "the receiver said what the attach protocol does not allow");
    if (sp_guest_join(&handle->guest, &geometry, deadline, trouble))
        return -1;
    return listen_on(handle, trouble);
}

void sp_handle_look(sp_handle *handle, sp_heard *heard)
{
    uint32_t news = atomic_load(&handle->bell.rung); /* before: what comes meanwhile is news */
    pthread_mutex_lock(&handle->lock);
    *heard = handle->heard;
    pthread_mutex_unlock(&handle->lock);
    heard->news = news;
}

void sp_handle_await(sp_handle *handle, uint32_t news, int timeout_ms)
{
    sp_bell_prepare(&handle->bell);
    sp_bell_wait(&handle->bell, news, timeout_ms);
}

void sp_handle_stop(sp_handle *handle)
{
    if (!handle->following || getpid() != handle->owner)
        return;
    sp_guest_unfollow(&handle->guest);
    handle->following = 0;
}

int sp_handle_go_on(sp_handle *handle, sp_trouble *trouble)
{
    sp_guest *guest = &handle->guest;
    if (!guest->attached || atomic_load(&guest->completed) || getpid() != handle->owner)
        return 0;
    return listen_on(handle, trouble);
}
