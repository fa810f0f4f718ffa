/* The return path: what goes back to the source.
 *
 * A fault loop sends its request itself while nobody else writes: that spares a process and a
 * wake-up.  Otherwise it goes through its ring, and the loop here drains the rings into REQ_PAGES_ID
 * / REQ_PAGES messages and sends them together with what Python posts (PONG, SHUT, ...).  Within one
 * write a block's name is sent only when it changes.
 *
 * A request can be lost: with a connection, or with a fault loop that died between the claim and the
 * wire.  So `again` asks for every page that is requested and not received; a source takes repeated
 * requests well.
 */
#ifndef SP_RETURN_PATH_H
#define SP_RETURN_PATH_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shared/control.h"
#include "shared/status.h"

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

sp_return_path *sp_rp_new(sp_control *c, int fd);
void sp_rp_free(sp_return_path *rp);
/* Hands a whole message over; 0 or -ENOBUFS. */
int sp_rp_post(sp_return_path *rp, const uint8_t *msg, size_t len);
/* Requests may be sent from now on; those that are outstanding are sent first. */
void sp_rp_arm(sp_return_path *rp, const sp_word *received, const sp_word *requested);
/* Sends all outstanding requests once more; nothing if the path is not armed. */
void sp_rp_again(sp_return_path *rp);
/* Queues a block's RECV_BITMAP: message, then be64 size, the bits in little-endian words, be64 end
 * mark (QEMU migration/ram.c ramblock_recv_bitmap_send).  0 or -ENOBUFS. */
int sp_rp_bitmap(sp_return_path *rp, const sp_word *received, uint32_t block);
/* Ends the loop after everything posted was sent. */
void sp_rp_stop(sp_return_path *rp);
sp_status sp_rp_loop(sp_return_path *rp);

#endif
