/* The attach socket, client's end: JSON objects with descriptors, every wait with a deadline. */
#ifndef SP_CHANNEL_H
#define SP_CHANNEL_H

#include <stdint.h>

#include "message.h"

enum { SP_MESSAGE_ROOM = 256 << 10 }; /* 250 blocks with names of 255 bytes need half of it */

#define SP_FOR_EVER 0

/* Why something failed, for people. */
typedef struct sp_trouble {
    char text[512];
} sp_trouble;

/* Writes the reason and answers -1. */
__attribute__((format(printf, 2, 3))) int sp_fail(sp_trouble *trouble, const char *format, ...);

typedef struct sp_channel {
    int sock; /* -1: none */
    unsigned n_rights;
    int rights[SP_MAX_RIGHTS]; /* descriptors that came, in order; the channel's */
    size_t used;               /* bytes of buf that the last message took */
    size_t len;                /* bytes in buf */
    sp_cut cut;
    char buf[SP_MESSAGE_ROOM];
} sp_channel;

/* CLOCK_MONOTONIC; a deadline is a value of it, or SP_FOR_EVER. */
uint64_t sp_clock_ns(void);

/* All answer -1 and the reason on failure.  The socket and all descriptors are close-on-exec. */
int sp_channel_open(sp_channel *channel, const char *path, uint64_t deadline, sp_trouble *trouble);
int sp_channel_send(sp_channel *channel, const char *data, size_t len, const int *fds,
                    unsigned n_fds, uint64_t deadline, sp_trouble *trouble);
/* 1: a message, whose texts hold until the next call; 0: the receiver closed the socket. */
int sp_channel_receive(sp_channel *channel, sp_message *message, uint64_t deadline,
                       sp_trouble *trouble);
/* Closes the descriptors that came. */
void sp_channel_drop_rights(sp_channel *channel);
void sp_channel_close(sp_channel *channel);

#endif
