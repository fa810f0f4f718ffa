/* The guests as the coordinator knows them.
 *
 * Whoever holds a requested page makes it visible: the stream's thread does it through the guest's
 * own userfaultfd, one process and two wake-ups before the worker could.  The workers' tables
 * (worker.h) are the workers' own; a guest is added here first and dropped here last, so that this
 * table never lacks a guest that a worker answers.
 */
#ifndef SP_GUESTS_H
#define SP_GUESTS_H

#include "shared/control.h"

typedef struct sp_peer {
    _Atomic uint32_t active; /* writer: main thread, after the rest of the entry */
    int uffd[SP_MAX_SHARDS]; /* copies of the guest's, the caller's to close after the drop */
    uint64_t base[SP_MAX_BLOCKS]; /* 0: not mapped */
} sp_peer;

typedef struct sp_guests {
    sp_control *control;
    _Atomic uint32_t in_use; /* how many use entries now; writers: the channels' threads */
    int fd[SP_MAX_BLOCKS];   /* the segments */
    sp_peer peers[SP_MAX_GUESTS];
} sp_guests;

sp_guests *sp_guests_new(sp_control *c);
void sp_guests_free(sp_guests *g);
/* Main thread.  -EBUSY if the slot is taken. */
int sp_guests_add(sp_guests *g, uint32_t slot, const int *uffds, const uint64_t *base);
/* Afterwards nobody uses the slot's descriptors. */
void sp_guests_drop(sp_guests *g, uint32_t slot);

/* A channel's thread: makes one page that a guest waits for visible and marks it received.
 * `copy`: its bytes stand at `src` (NULL: zeros), and there is one guest only; `continue`: it stands
 * in its block and is received.  False: not done, the worker has to. */
bool sp_guests_give(sp_guests *g, sp_word *received, uint32_t block, uint64_t page,
                    const uint8_t *src);
/* A channel's thread: whoever waits for the page looks again. */
void sp_guests_wake(sp_guests *g, uint32_t block, uint64_t page);

#endif
