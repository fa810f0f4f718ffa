/* The attach socket, client's end: JSON objects with descriptors, every wait with a deadline. */
#ifndef SP_CHANNEL_H
#define SP_CHANNEL_H

#include <stdint.h>

#include "message.h"

enum { SP_MESSAGE_ROOM = 256 << 10 }; /* 250 blocks with names of 255 bytes need half of it */

#define SP_FOR_EVER 0

/* What failed, for programs. */
typedef enum sp_cause {
    SP_CAUSE_RECEIVER = 0, /* it went away, refused, or said what nobody expected */
    SP_CAUSE_NOBODY,       /* nobody listens there */
    SP_CAUSE_STRANGER,     /* it receives other memory, or in another way, or wants us no more */
    SP_CAUSE_HOST,         /* this machine cannot do it */
    SP_CAUSE_LATE,         /* the deadline has passed */
    SP_CAUSE_STOPPED,      /* sp_channel_stop */
} sp_cause;

/* Why something failed. */
typedef struct sp_trouble {
    char text[512];
    sp_cause cause;
} sp_trouble;

/* Write the reason and answer -1; sp_fail blames the receiver. */
__attribute__((format(printf, 2, 3))) int sp_fail(sp_trouble *trouble, const char *format, ...);
__attribute__((format(printf, 3, 4))) int sp_fail_as(sp_trouble *trouble, sp_cause cause,
                                                     const char *format, ...);

typedef struct sp_channel {
    int sock; /* -1: none */
    int stop; /* an eventfd that ends every wait, or -1 */
    unsigned n_rights;
    int rights[SP_MAX_RIGHTS]; /* descriptors that came, in order; the channel's */
    size_t used;               /* bytes of buf that the last message took */
    size_t len;                /* bytes in buf */
    sp_cut cut;
    char buf[SP_MESSAGE_ROOM];
} sp_channel;

/* CLOCK_MONOTONIC; a deadline is a value of it, or SP_FOR_EVER. */
uint64_t sp_clock_ns(void);

/* Before anything else; with_stop: sp_channel_stop works.  0 or -errno. */
int sp_channel_init(sp_channel *channel, int with_stop);
/* Ends every wait, now and until sp_channel_go_on(); by any thread. */
void sp_channel_stop(sp_channel *channel);
void sp_channel_go_on(sp_channel *channel);
/* Waits so long, or until stopped (1). */
int sp_channel_pause(const sp_channel *channel, unsigned ms);

/* All answer -1 and the reason on failure.  The socket and all descriptors are close-on-exec. */
int sp_channel_open(sp_channel *channel, const char *path, uint64_t deadline, sp_trouble *trouble);
/* Instead: this socket, which somebody else has connected; non-blocking, the channel's. */
void sp_channel_use(sp_channel *channel, int sock);
int sp_channel_send(sp_channel *channel, const char *data, size_t len, const int *fds,
                    unsigned n_fds, uint64_t deadline, sp_trouble *trouble);
/* 1: a message, whose texts hold until the next call; 0: the receiver closed the socket. */
int sp_channel_receive(sp_channel *channel, sp_message *message, uint64_t deadline,
                       sp_trouble *trouble);
/* Closes the descriptors that came. */
void sp_channel_drop_rights(sp_channel *channel);
void sp_channel_close(sp_channel *channel);
void sp_channel_deinit(sp_channel *channel);

#endif
