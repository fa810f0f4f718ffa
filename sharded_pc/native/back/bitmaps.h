/* Received bitmaps: a source that resumes asks which pages need not be sent again. */
#ifndef SP_BACK_BITMAPS_H
#define SP_BACK_BITMAPS_H

#include "back/state.h"
#include "shared/status.h"

/* Queues a block's RECV_BITMAP: message, then be64 size, the bits in little-endian words, be64 end
 * mark (QEMU migration/ram.c ramblock_recv_bitmap_send).  0 or -ENOBUFS. */
int sp_rp_bitmap(sp_return_path *rp, const sp_word *received, uint32_t block);
/* Writes all that are queued; the loop's, with the writer's word. */
sp_status sp_rp_write_bitmaps(sp_return_path *rp);

#endif
