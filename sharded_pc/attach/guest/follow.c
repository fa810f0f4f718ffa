/* The thread that hears the receiver after the hand-over.
 *
 * It is a thread of C so that it goes on while others of its process wait for a page: Python's would
 * need the GIL, which who waits may hold.
 *
 * While the receiver is away the userfaultfds stay open: accesses to missing pages wait.  If all
 * copies closed, the kernel would wake the waiters and they would read zeros.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

/* As sharded_pc/threads.py. */
static const char MORE_THREADS[] = ": raise `ulimit -u`, the cgroup's pids.max, vm.max_map_count or "
                                   "`ulimit -v`";

#define STEP_NS 10000000000ull /* for one hand-over again */

/* A successor's guests wait until the next try: pauses are short.  Who has taken the place but not the
 * memory, or takes us and drops us again, is bothered less. */
enum { FIRST_PAUSE_MS = 50, LAST_PAUSE_MS = 250, LONG_PAUSE_MS = 2000 };

static void tell(sp_guest *guest, sp_news news, const char *why)
{
    if (guest->kind->tell)
        guest->kind->tell(guest, news, why);
}

/* Does the thread go on?  Else why not. */
typedef enum verdict { GO_ON, STOPPED, OFFERED, COMPLETED } verdict;

/* This receiver brings no more pages, and is about to close the socket. */
static void note_failure(sp_guest *guest, const sp_message *message, sp_trouble *trouble)
{
    sp_guest_object(message, guest->attached ? "dropped this guest" : "refused", trouble);
    if (!guest->attached)
        return; /* the thread ends for that reason */
    if (message->kind == SP_SAYS_ERROR)
        trouble->cause = SP_CAUSE_STRANGER;
    tell(guest, SP_NEWS_FAILED, trouble->text);
}

/* Before anything is mapped. */
static verdict hear_offer(sp_guest *guest, const sp_message *message, sp_trouble *trouble)
{
    if (message->kind == SP_SAYS_GEOMETRY) {
        tell(guest, SP_NEWS_OFFERED, NULL);
        return OFFERED;
    }
    sp_guest_object(message, "refused", trouble);
    return GO_ON;
}

static verdict act(sp_guest *guest, const sp_message *message, sp_trouble *trouble)
{
    switch (message->kind) {
    case SP_SAYS_ATTACHED:
        guest->number = message->guest;
        guest->attached = guest->memory.mode != 0; /* else only COMPLETED makes that right */
        if (guest->attached)
            tell(guest, SP_NEWS_ATTACHED, NULL);
        break;
    case SP_SAYS_READY:
        guest->ready = 1;
        tell(guest, SP_NEWS_READY, NULL);
        break;
    case SP_SAYS_COMPLETED:
        sp_guest_complete(guest, message->huge);
        tell(guest, SP_NEWS_COMPLETED, NULL);
        return COMPLETED;
    case SP_SAYS_FAILED:
    case SP_SAYS_ERROR:
        note_failure(guest, message, trouble);
        break;
    default:
        break; /* what newer receivers say */
    }
    return GO_ON;
}

/* Hears the receiver; GO_ON: it went away, and `trouble` is what it said last. */
static verdict hear(sp_guest *guest, sp_trouble *trouble)
{
    sp_message message;
    sp_fail(trouble, "%s", "");
    while (sp_channel_receive(&guest->channel, &message, SP_FOR_EVER, trouble) > 0) {
        if (guest->memory.n_segments == 0)
            return hear_offer(guest, &message, trouble);
        sp_channel_drop_rights(&guest->channel);
        if (act(guest, &message, trouble) == COMPLETED)
            return COMPLETED;
    }
    if (!*trouble->text)
        sp_fail(trouble, "the receiver %s", guest->attached ? "is gone"
                         : "went away in the middle of the hand-over");
    return trouble->cause == SP_CAUSE_STOPPED ? STOPPED : GO_ON;
}

static unsigned twice(unsigned ms, unsigned last)
{
    return ms * 2 < last ? ms * 2 : last;
}

/* Attaches to whoever takes the receiver's place; each new reason why not is told once. */
static verdict attach_again(sp_guest *guest, sp_trouble *trouble)
{
    sp_trouble told = *trouble;
    const char *who = guest->kind->who;
    for (unsigned ms = guest->pause_ms;;) {
        if (sp_channel_pause(&guest->channel, ms))
            return STOPPED;
        if (sp_guest_attach(guest, sp_clock_ns() + STEP_NS, trouble) == 0)
            break;
        if (trouble->cause == SP_CAUSE_STOPPED)
            return STOPPED;
        if (strcmp(told.text, trouble->text) != 0) {
            sp_say(who, "attach again: %s; trying on", trouble->text);
            told = *trouble;
        }
        ms = twice(ms, trouble->cause == SP_CAUSE_STRANGER ? LONG_PAUSE_MS : LAST_PAUSE_MS);
    }
    sp_say(who, "attached again");
    tell(guest, atomic_load(&guest->completed) ? SP_NEWS_COMPLETED : SP_NEWS_ATTACHED, NULL);
    return GO_ON;
}

/* The receiver is gone; GO_ON: another may take its place. */
static verdict lose(sp_guest *guest, const sp_trouble *trouble)
{
    const char *who = guest->kind->who;
    int dropped = trouble->cause == SP_CAUSE_STRANGER;
    guest->pause_ms = dropped ? twice(guest->pause_ms, LONG_PAUSE_MS) : FIRST_PAUSE_MS;
    sp_channel_close(&guest->channel);
    if (!guest->attached) {
        tell(guest, SP_NEWS_ENDED, trouble->text);
        return STOPPED;
    }
    if (guest->bound && !guest->ready) {
        /* The guest has not run here, so nothing is lost: the source goes on with it. */
        sp_say(who, "%s before the guest could go on here", trouble->text);
        _exit(3);
    }
    sp_say(who, "%s; accesses to missing pages wait, attaching again", trouble->text);
    if (!guest->ready)
        tell(guest, SP_NEWS_FAILED, trouble->text);
    return GO_ON;
}

static void *follow(void *arg)
{
    sp_guest *guest = arg;
    sp_trouble trouble;
    verdict what = GO_ON;
    pthread_setname_np(pthread_self(), "sharded-pc"); /* another's would be by a file */
    sp_fail(&trouble, "the receiver is gone");
    if (!guest->pause_ms)
        guest->pause_ms = FIRST_PAUSE_MS;
    while (what == GO_ON && !atomic_load(&guest->completed)) {
        if (guest->channel.sock < 0)
            what = attach_again(guest, &trouble);
        else if ((what = hear(guest, &trouble)) == GO_ON)
            what = lose(guest, &trouble);
    }
    return NULL;
}

int sp_guest_follow(sp_guest *guest, sp_trouble *trouble)
{
    sigset_t all, before;
    /* The process's signals are its own threads' to take. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int err = pthread_create(&guest->thread, NULL, follow, guest);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err)
        return sp_fail_as(trouble, SP_CAUSE_HOST, "start a thread: %s%s", strerror(err),
                          err == EAGAIN ? MORE_THREADS : "");
    return 0;
}

void sp_guest_unfollow(sp_guest *guest)
{
    sp_channel_stop(&guest->channel);
    pthread_join(guest->thread, NULL);
    sp_channel_go_on(&guest->channel);
}
