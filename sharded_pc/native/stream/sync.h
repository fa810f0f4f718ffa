/* Where the main channel and the channels of multifd meet. */
#ifndef SP_SYNC_H
#define SP_SYNC_H

#include "shared/control.h"
#include "shared/status.h"

typedef struct sp_sync_view {
    uint64_t packets, numbers; /* of all channels: came, and were given a number by the source */
    uint32_t lost;             /* the channel of SP_CHANNEL_LOST */
} sp_sync_view;

/* Before channel `number` is given to a worker. */
void sp_sync_expect(sp_control *c, uint32_t number);
/* Sleeps until each of n channels has come to `syncs` SYNCs: SP_OK, SP_STOPPED, SP_CHANNEL_LOST. */
sp_status sp_sync_await(sp_control *c, uint32_t n, uint64_t syncs, const _Atomic uint32_t *stop,
                        sp_sync_view *view);
/* Channels may pass as many. */
void sp_sync_release(sp_control *c, uint64_t syncs);
/* No pages may come any more, and no channel waits; the first that is writing some, or -1. */
int sp_sync_settle(sp_control *c, uint32_t n);

#endif
