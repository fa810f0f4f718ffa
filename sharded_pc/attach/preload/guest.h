/* A process that runs on the receiver's memory: what it has mapped, and its hand-over. */
#ifndef SP_GUEST_H
#define SP_GUEST_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "channel.h"

/* One file of the receiver's, and where this process has mapped it. */
typedef struct sp_segment {
    char *path;
    dev_t dev;
    ino_t ino;
    uint64_t size;         /* bytes */
    uint8_t *base;         /* NULL until mapped */
    int prot;              /* as the process asked for it */
    uint64_t first_stripe; /* once attached */
    int dont_fork, no_huge; /* as the process asked for it (hold.c) */
} sp_segment;

typedef struct sp_guest {
    const char *socket_path;
    sp_segment *segments;
    unsigned n_segments;
    uint64_t stripe_bytes, shards; /* as registered; 0 shards: nothing is */
    int uffds[SP_MAX_RIGHTS];      /* our own copies, one for each shard */
    int bound;                     /* ends with its receiver until memory may be touched */
    int ready;                     /* memory may be touched; the following thread's */
    atomic_int completed;          /* everything is here; written by whoever hears it, once */
    sp_channel channel;
} sp_guest;

/* Prints "sharded_pc preload: ..." on stderr, in one piece. */
__attribute__((format(printf, 1, 2))) void sp_say(const char *format, ...);

/* One hand-over.  The first registers; a later one hands the same userfaultfds over again.
 * 0: attached, or completed already; -1 and the reason. */
int sp_guest_attach(sp_guest *guest, uint64_t deadline, sp_trouble *trouble);

/* Everything is here, so nobody waits on the userfaultfds any more: closes them. */
void sp_guest_complete(sp_guest *guest);

/* Starts the thread that hears the receiver from now on, and attaches again if it goes away; the
 * thread ends when everything is here.  0 or -1 and the reason. */
int sp_guest_follow(sp_guest *guest, sp_trouble *trouble);

#endif
