/* The return path: what goes back to the source.
 *
 * A fault loop sends its request itself while nobody else writes: that spares a process and a
 * wake-up.  Otherwise it goes through its ring, and the loop here drains the rings into REQ_PAGES_ID
 * / REQ_PAGES messages and sends them together with what Python posts (PONG, SHUT, ...).  Within one
 * write a block's name is sent only when it changes.
 */
#ifndef SP_RETURN_PATH_H
#define SP_RETURN_PATH_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.h"
#include "status.h"

enum { SP_RP_BUFFER = 16384, SP_RP_OUTBOX = 4096 };

typedef struct sp_return_path {
    sp_control *control;
    int fd;               /* -1: no way back, messages are dropped */
    int err;
    uint32_t last_block;  /* of the last request, UINT32_MAX: none */
    _Atomic uint32_t armed; /* requests may be sent (from LISTENING on) */
    _Atomic uint32_t stop;
    _Atomic uint32_t posted; /* the outbox has bytes */
    _Atomic uint64_t sent;   /* bytes */
    pthread_mutex_t lock;    /* of the outbox: once per control message, never per page */
    size_t n_outbox, n_out;
    uint8_t outbox[SP_RP_OUTBOX];
    uint8_t out[SP_RP_BUFFER];
} sp_return_path;

/* One REQ_PAGES_ID for one page from a fault loop of this shard; fd: the wire.  False: not sent, the
 * ring has to take it. */
bool sp_rp_request(sp_control *c, int fd, uint32_t shard, uint32_t block, uint64_t page,
                   const _Atomic uint32_t *stop);

sp_return_path *sp_rp_new(sp_control *c, int fd);
void sp_rp_free(sp_return_path *rp);
/* Hands a whole message over; 0 or -ENOBUFS. */
int sp_rp_post(sp_return_path *rp, const uint8_t *msg, size_t len);
void sp_rp_arm(sp_return_path *rp);
/* Ends the loop after everything posted was sent. */
void sp_rp_stop(sp_return_path *rp);
sp_status sp_rp_loop(sp_return_path *rp);

#endif
