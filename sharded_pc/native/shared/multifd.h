/* A channel of multifd as coordinator and workers see it: how far it is, and what ended it.
 *
 * Every channel sends SYNC where the main channel says so, and waits there until the main channel has
 * come to the same place.  So nothing of the next round is written before something of this one.
 */
#ifndef SP_MULTIFD_H
#define SP_MULTIFD_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stdint.h>

#define SP_MAX_CHANNELS 255u /* QEMU's multifd-channels is a byte */
#define SP_SYNC_NEVER UINT64_MAX

enum { SP_MULTIFD_NONE = 0, SP_MULTIFD_RUNS = 1, SP_MULTIFD_ENDED = 2 };

/* Writer: its loop (multifd/loop.c), in the worker that was given it. */
typedef struct sp_multifd_channel {
    alignas(64) _Atomic uint32_t state; /* the fields behind `packets` stand before ENDED (release) */
    _Atomic uint32_t landing;           /* 1 while pages of it are written: a Dekker pair with `released` */
    _Atomic uint64_t syncs;             /* SYNCs it has come to; release: its pages are in place */
    _Atomic uint64_t packets;           /* those with pages, and SYNCs */
    _Atomic uint64_t next_number;       /* the highest packet number of those, and one */
    uint32_t status;                    /* sp_status: why it ended */
    int err;                            /* of SP_SYS */
    uint64_t value, limit;              /* what was found, what was expected */
    char name[256];                     /* the block that a bad packet names */
} sp_multifd_channel;

#endif
