/* One shard's worker: places pages, answers faults.
 *
 * Threads of a worker process: one placement loop (sp_worker_place) and one fault loop per attached
 * guest (sp_worker_faults), none holding the GIL, plus Python's main thread, which adds and drops
 * guests.  The placement loop is the only writer of `received` for the shard's pages.
 */
#ifndef SP_WORKER_H
#define SP_WORKER_H

#include "shared/control.h"
#include "shared/status.h"

enum { SP_GUEST_FREE = 0, SP_GUEST_ACTIVE = 1, SP_GUEST_LEAVING = 2 };

typedef struct sp_guest {
    _Atomic uint32_t state; /* FREE to ACTIVE, ACTIVE to LEAVING: main thread; LEAVING to FREE: placement */
    _Atomic uint32_t stop;  /* of its fault loop; writer: main thread */
    int uffd;
    uint64_t base[SP_MAX_BLOCKS]; /* where the guest mapped each block, 0: not mapped */
    /* `continue`: the stripe from which on pages that are here are still to be mapped ahead.
     * Writer: main thread before ACTIVE, then placement. */
    uint32_t ahead_block;
    uint64_t ahead_page;
} sp_guest;

typedef struct sp_worker {
    sp_control *control;
    sp_shard *shard;
    uint32_t index;
    int back_fd;   /* the wire's way back for requests, -1: by the ring; writer: main thread, before
                    * the fault loops start or while they ask for nothing (back_lost) */
    uint8_t *pool; /* this shard's tmp pages */
    sp_word *received, *requested;
    sp_word *written; /* `copy`: pages that stand there though they are not received; writer: placement */
    int uffd;      /* this process's own, on its own mapping of every block; -1: `continue` */
    uint8_t *base[SP_MAX_BLOCKS];
    int fd[SP_MAX_BLOCKS];
    _Atomic uint32_t stop;
    _Atomic uint32_t listening; /* all discards are done; writer: main thread */
    _Atomic uint32_t placing; /* a placement loop runs; writer: placement */
    int err;               /* errno of a failed placement */
    uint64_t err_bit;      /* where */
    sp_guest guests[SP_MAX_GUESTS];
} sp_worker;

/* `uffd`: blocking, from sp_uffd_open, -1 with `continue`.  The worker owns no mapping; Python
 * unmaps. */
sp_worker *sp_worker_new(sp_control *c, uint32_t index, uint8_t *pool, sp_word *received,
                         sp_word *requested, sp_word *written, int uffd);
void sp_worker_free(sp_worker *w);
/* Makes a block known and registers this process's mapping of it (MISSING); with `continue` there is
 * none (NULL).  0 or -errno. */
int sp_worker_add_block(sp_worker *w, uint32_t block, uint8_t *base, int fd);

/* Runs until stopped or broken: SP_STOPPED, SP_SYS (err, err_bit). */
sp_status sp_worker_place(sp_worker *w);
/* From now on pages that are here may be made visible to guests (`continue` maps them ahead), and
 * missing ones are asked for on the wire `back_fd` (-1: through the ring). */
void sp_worker_listen(sp_worker *w, int back_fd);
/* Runs until the guest or the worker is stopped: SP_STOPPED, SP_SYS (guest broken), SP_EOF. */
sp_status sp_worker_faults(sp_worker *w, uint32_t guest, int *err, uint64_t *err_addr);
void sp_worker_stop(sp_worker *w);

/* Registers this shard's stripes of the guest's mappings with its userfaultfd (which proves that
 * they are mapped where the guest says) and makes the guest known.  0 or -errno, *bad = block. */
int sp_worker_add_guest(sp_worker *w, uint32_t guest, int uffd, const uint64_t *base,
                        uint64_t mode, uint32_t *bad);
/* Makes a signal interrupt a blocking read instead of ending the process.  0 or -errno. */
int sp_allow_interrupts(int signo);
/* Asks the guest's fault loop to end; the caller interrupts its read by a signal and joins. */
void sp_worker_stop_guest(sp_worker *w, uint32_t guest);
/* After the fault loop ended: forgets the guest; unregisters its stripes first if `release`
 * (every page is here: its waiters run on plain shared memory). */
void sp_worker_drop_guest(sp_worker *w, uint32_t guest, int release);
/* Wakes everything that waits on this shard's stripes of every guest. */
void sp_worker_wake_all(sp_worker *w);

#endif
