/* A guest for a program that holds it by a pointer: Python.  It is offered the memory, maps it, joins,
 * and asks what its thread has heard.  One thread of the program's at a time, but for look and await.
 */
#ifndef SP_HANDLE_H
#define SP_HANDLE_H

#include "channel.h"

typedef struct sp_handle sp_handle;

/* What the guest's thread has heard. */
typedef struct sp_heard {
    uint32_t news; /* another number whenever something else is */
    int offered, attached, ready, completed;
    int ended;         /* the first hand-over failed: there is nothing more to hear */
    int64_t number;    /* the receiver's for this guest */
    uint32_t failures; /* how often `why` was told */
    char why[512];     /* the receiver will bring no pages; "" again once another one has attached us */
} sp_heard;

sp_handle *sp_handle_new(const char *socket_path); /* NULL: no memory */
/* Once it is closed and nobody looks or waits any more; does nothing while its thread lives. */
void sp_handle_free(sp_handle *handle);

/* Connects, asks and listens.  0, or -1 and the reason. */
int sp_handle_open(sp_handle *handle, uint64_t deadline, sp_trouble *trouble);

/* Once offered: the message, and a descriptor for each block, which stay the handle's. */
const char *sp_handle_geometry(sp_handle *handle, size_t *len);
const int *sp_handle_rights(sp_handle *handle, unsigned *n);

/* A block is mapped, all of it, at `base`; -errno. */
int sp_handle_add(sp_handle *handle, const char *name, int fd, uint8_t *base);

/* All are: registers them, hands them over and listens.  0, or -1 and the reason. */
int sp_handle_join(sp_handle *handle, uint64_t deadline, sp_trouble *trouble);

void sp_handle_look(sp_handle *handle, sp_heard *heard);
/* Waits for other news than these, a signal, or so long. */
void sp_handle_await(sp_handle *handle, uint32_t news, int timeout_ms);

/* Ends the thread: from now on nothing touches the memory.  In a forked child there is none. */
void sp_handle_stop(sp_handle *handle);
/* The memory is mapped still: listens on.  0, or -1 and the reason. */
int sp_handle_go_on(sp_handle *handle, sp_trouble *trouble);
/* It is stopped, and the memory unmapped: closes the userfaultfds and the rest, and wakes who waits. */
void sp_handle_close(sp_handle *handle);

#endif
