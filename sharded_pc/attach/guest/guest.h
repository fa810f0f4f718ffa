/* The guest's end of the attach protocol (attach/protocol.py): a process that runs on the receiver's
 * memory, its hand-over, and the thread that hears the receiver afterwards.
 *
 * Three run it: the preload library (attach/preload), which finds the memory mapped, the library of
 * `sharded-pc guest` (attach/program) and Python (handle.h), which map it when it is offered.
 */
#ifndef SP_GUEST_H
#define SP_GUEST_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "channel.h"
#include "memory.h"

typedef struct sp_guest sp_guest;

typedef enum sp_news {
    SP_NEWS_OFFERED = 1, /* a geometry, before the first hand-over: the thread ends */
    SP_NEWS_ATTACHED,    /* by this receiver or its successor */
    SP_NEWS_READY,       /* memory may be touched */
    SP_NEWS_FAILED,      /* `why`: this receiver will bring no pages, or none at all was found */
    SP_NEWS_COMPLETED,   /* everything is here, nothing is registered; the thread ends */
    SP_NEWS_ENDED,       /* `why`: the first hand-over failed; the thread ends */
} sp_news;

/* What differs between those who run this. */
typedef struct sp_guest_kind {
    const char *who; /* begins every line on stderr */
    /* What is told to the process; by the thread.  NULL: nobody asks. */
    void (*tell)(sp_guest *guest, sp_news news, const char *why);
    /* Instead of connecting to socket_path and asking there; 0, or -1 and the reason.  Or NULL. */
    int (*open)(sp_guest *guest, uint64_t deadline, sp_trouble *trouble);
    /* Maps the memory as the first geometry has come, whose descriptors the channel has; 0, or -1 and
     * the reason.  NULL: it is mapped before. */
    int (*map)(sp_guest *guest, const sp_message *geometry, sp_trouble *trouble);
    /* Instead of sp_memory_let_go(), when everything is here; or NULL. */
    void (*let_go)(sp_guest *guest);
} sp_guest_kind;

struct sp_guest {
    const sp_guest_kind *kind;
    char *socket_path;
    sp_memory memory;
    int bound;            /* the process ends with its receiver until memory may be touched */
    int attached;         /* by a receiver, some time: if it goes, another may take its place */
    unsigned pause_ms;    /* before the next try; the thread's */
    int64_t number;       /* the receiver's number for us; -1: it needs none */
    int ready;            /* memory may be touched */
    atomic_int completed; /* everything is here; written by whoever hears it, once */
    pthread_t thread;
    sp_channel channel;
};

/* Prints "WHO: ..." on stderr, in one piece. */
__attribute__((format(printf, 2, 3))) void sp_say(const char *who, const char *format, ...);

/* This came instead of what was expected; `does` is what an error means: -1 and the reason. */
int sp_guest_object(const sp_message *message, const char *does, sp_trouble *trouble);

/* A first hand-over in two steps, for who maps the memory in between.  0, or -1 and the reason.
 * open: connects and asks; the geometry is the next message.
 * join: this was the geometry; registers, and hands the userfaultfds over; what comes next is an
 * answer to that. */
int sp_guest_open(sp_guest *guest, uint64_t deadline, sp_trouble *trouble);
int sp_guest_join(sp_guest *guest, const sp_message *geometry, uint64_t deadline,
                  sp_trouble *trouble);

/* One whole hand-over.  The first registers; a later one hands the same userfaultfds over again.
 * 0: attached, or completed already; -1 and the reason. */
int sp_guest_attach(sp_guest *guest, uint64_t deadline, sp_trouble *trouble);

/* Everything is here, so nobody waits on the userfaultfds any more: closes them. */
void sp_guest_complete(sp_guest *guest, int huge_pages);

/* Starts the thread that hears the receiver from now on, and attaches again if it goes away.  0 or
 * -1 and the reason. */
int sp_guest_follow(sp_guest *guest, sp_trouble *trouble);

/* Ends the thread, at once; sp_guest_follow() goes on where it stopped.  Needs a channel that can be
 * stopped. */
void sp_guest_unfollow(sp_guest *guest);

#endif
