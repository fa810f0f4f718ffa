/* A relay between a QMP monitor of this process and its client, as long as a migration comes in.
 *
 * QEMU is given one end of a socket pair instead of the connection that it accepts.  A thread passes
 * commands on to QEMU and what QEMU says to the client, but:
 *
 *   - commands that are the migration's (OWNED in relay.c) go to the receiver, which answers them;
 *   - QEMU's own MIGRATION events are dropped (they tell of the stream that the receiver feeds it),
 *     the receiver's come instead.
 *
 * Commands are passed one by one: the next when the one before has its reply, so that replies come
 * in the commands' order whoever gives them.  When the receiver says that the migration is over, and
 * nothing is under way, the real connection takes the pair's place under QEMU's descriptor (dup2):
 * the thread ends, and nobody stands between any more.
 *
 * All of it is in QEMU's own process, so that it can die no death but QEMU's.  While no receiver is
 * there everything else passes; what is the migration's waits for a successor, and is refused after
 * SP_RELAY_PATIENCE_MS.
 */
#ifndef SP_RELAY_H
#define SP_RELAY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "qmp.h"

enum { SP_RELAY_PATIENCE_MS = 20000, SP_RELAY_MAX_FDS = 16 };

/* Between this relay and the receiver: frames of a kind, a length and so many bytes. */
typedef struct sp_frame {
    uint32_t kind; /* one of the letters below */
    uint32_t len;
} sp_frame;

enum {
    /* to the receiver */
    SP_FRAME_COMMAND = 'C', /* a command that is the migration's: one ANSWER is due */
    SP_FRAME_LEFT = 'L',    /* the client's connection is QEMU's, or there is none */
    /* from the receiver */
    SP_FRAME_ANSWER = 'A', /* the reply to that command */
    SP_FRAME_EVENT = 'E',  /* for a client that has negotiated */
    SP_FRAME_OVER = 'O',   /* the migration is over: leave */
    /* both ways */
    SP_FRAME_PING = 'P', /* comes back when everything before it is with the client */
};

typedef struct sp_waiting {
    enum { SP_NOBODY, SP_QEMU, SP_RECEIVER } whom;
    sp_bytes command; /* it waits for */
    uint64_t since_ms;
    int sent;         /* to a receiver that lives */
    int negotiates;
} sp_waiting;

typedef struct sp_relay {
    const char *receiver_path;
    int wake; /* eventfd: a client was accepted */

    /* Of what follows, up to `next`: who writes to `outer` holds it, and who exchanges it. */
    pthread_mutex_t lock;
    atomic_int outer;   /* QEMU's descriptor of the pair, -1: none */
    int next_client;    /* accepted, not yet the thread's; -1: none */
    int next_inner;     /* the pair's other end */
    int left;           /* nobody stands between any more: a client is QEMU's own */
    int parked;         /* the thread waits until QEMU has exchanged `outer`, or it cannot be now */

    atomic_int over; /* written by the thread, once */

    /* The thread's own; `client` changes under the lock. */
    int client, inner, receiver;
    sp_bytes from_client, from_qemu, from_receiver;
    sp_cut client_cut, qemu_cut;
    int fds[SP_RELAY_MAX_FDS];
    unsigned n_fds;
    int negotiated;
    int guest_runs; /* the receiver has said postcopy-active: if it dies, that is a pause */
    int told_pause; /* of such a death: its successor's first word is the same */
    sp_waiting waiting;
    unsigned stale; /* ANSWERs that are still to come for clients that are gone */
} sp_relay;

/* 0 or -errno; the thread lives until the migration is over, or the process ends. */
int sp_relay_start(sp_relay *relay, const char *receiver_path);

/* --- what QEMU's own threads call (outer.c) --- */

/* QEMU has accepted a client: the descriptor that it is to have instead, or -1 and errno. */
int sp_relay_accepted(sp_relay *relay, int client);

/* Is it that descriptor, now? */
int sp_relay_has(sp_relay *relay, int fd);
/* QEMU's sendmsg(2) and recvmsg(2), on whatever descriptor. */
struct msghdr;
ssize_t sp_relay_send(sp_relay *relay, int fd, const struct msghdr *msg, int flags);
ssize_t sp_relay_receive(sp_relay *relay, int fd, struct msghdr *msg, int flags);
/* The client's connection's own name, for the descriptor that QEMU has. */
struct sockaddr;
int sp_relay_getsockname(sp_relay *relay, struct sockaddr *addr, unsigned *len);
/* QEMU is about to close it. */
void sp_relay_forget(sp_relay *relay);

#endif
