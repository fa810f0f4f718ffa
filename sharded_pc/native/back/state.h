/* What the return path's files share: the loop's own, but for what others post under the lock. */
#ifndef SP_BACK_STATE_H
#define SP_BACK_STATE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "shared/control.h"

enum { SP_RP_BUFFER = 16384, SP_RP_OUTBOX = 4096 };

typedef struct sp_return_path {
    sp_control *control;
    int fd;               /* -1: no way back, messages are dropped */
    int err;
    uint32_t last_block;  /* of the last request, UINT32_MAX: none */
    const sp_word *received, *requested; /* there once armed */
    _Atomic uint32_t armed; /* requests may be sent (from LISTENING on) */
    _Atomic uint32_t again; /* all outstanding requests are to be sent once more */
    uint32_t again_block;   /* where that is; the loop's */
    uint64_t again_page;
    _Atomic uint32_t stop;
    _Atomic uint32_t posted; /* the outbox has bytes */
    _Atomic uint64_t sent;   /* bytes */
    pthread_mutex_t lock;    /* of the outbox: once per control message, never per page */
    size_t n_outbox, n_out, n_bitmaps;
    uint8_t outbox[SP_RP_OUTBOX];
    uint32_t bitmaps[SP_MAX_BLOCKS]; /* blocks whose received bitmap is to be sent, under the lock */
    uint8_t out[SP_RP_BUFFER];
} sp_return_path;

#endif
