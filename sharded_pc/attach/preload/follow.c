/* The thread that hears the receiver after the hand-over.
 *
 * While the receiver is away the userfaultfds stay open: accesses to missing pages wait.  If all
 * copies closed, the kernel would wake the waiters and they would read zeros.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define STEP_NS 10000000000ull /* for one hand-over again */
#define COLLAPSE 25            /* MADV_COLLAPSE, Linux 6.1; Debian 12's headers lack it */

enum { FIRST_PAUSE_MS = 50, LAST_PAUSE_MS = 2000 };

/* Hears the receiver until it goes away (0) or everything is here (1). */
static int hear(sp_guest *guest, sp_message *message, sp_trouble *trouble)
{
    strcpy(trouble->text, "the receiver is gone");
    while (sp_channel_receive(&guest->channel, message, SP_FOR_EVER, trouble) > 0) {
        char text[256];
        sp_channel_drop_rights(&guest->channel);
        sp_text_print(text, sizeof text, message->desc);
        if (message->kind == SP_SAYS_COMPLETED)
            return 1;
        if (message->kind == SP_SAYS_READY)
            guest->ready = 1;
        if (message->kind == SP_SAYS_FAILED)
            sp_fail(trouble, "the migration failed: %s", text);
        else if (message->kind == SP_SAYS_ERROR)
            sp_fail(trouble, "the receiver dropped this guest: %s", text);
    }
    return 0;
}

static void pause_ms(unsigned ms)
{
    nanosleep(&(struct timespec){ms / 1000, (long)(ms % 1000) * 1000000}, NULL);
}

/* Attaches to whoever takes the receiver's place; each new reason why not is told once. */
static void attach_again(sp_guest *guest, sp_trouble *trouble)
{
    sp_trouble told = *trouble;
    sp_say("%s; accesses to missing pages wait, attaching again", trouble->text);
    for (unsigned ms = FIRST_PAUSE_MS;; ms = ms * 2 < LAST_PAUSE_MS ? ms * 2 : LAST_PAUSE_MS) {
        pause_ms(ms);
        if (sp_guest_attach(guest, sp_clock_ns() + STEP_NS, trouble) == 0)
            break;
        if (strcmp(told.text, trouble->text) != 0) {
            sp_say("attach again: %s; trying on", trouble->text);
            told = *trouble;
        }
    }
    sp_say("attached again");
}

/* The memory stands on huge pages, but was mapped page by page as it came: maps them whole. */
static void collapse(const sp_guest *guest)
{
    for (unsigned i = 0; i < guest->n_segments; i++)
        madvise(guest->segments[i].base, guest->segments[i].size, COLLAPSE);
}

static void *follow(void *arg)
{
    sp_guest *guest = arg;
    sp_message *message = malloc(sizeof *message);
    sp_trouble trouble;
    while (message && !atomic_load(&guest->completed)) {
        if (hear(guest, message, &trouble)) {
            sp_guest_complete(guest);
            if (message->huge)
                collapse(guest);
        } else if (guest->bound && !guest->ready) {
            /* The guest has not run here, so nothing is lost: the source goes on with it. */
            sp_say("%s before the guest could go on here", trouble.text);
            _exit(3);
        } else {
            sp_channel_close(&guest->channel);
            attach_again(guest, &trouble);
        }
    }
    free(message);
    return NULL;
}

int sp_guest_follow(sp_guest *guest, sp_trouble *trouble)
{
    sigset_t all, before;
    pthread_t thread;
    /* The process's signals are its own threads' to take. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int err = pthread_create(&thread, NULL, follow, guest);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err)
        return sp_fail(trouble, "start a thread: %s", strerror(err));
    pthread_setname_np(thread, "sharded-pc");
    pthread_detach(thread);
    return 0;
}
