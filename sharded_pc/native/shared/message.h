/* Messages of the return path as bytes (QEMU migration/migration.h MIG_RP_MSG_*): be16 type, be16
 * length, payload. */
#ifndef SP_MESSAGE_BYTES_H
#define SP_MESSAGE_BYTES_H

#include "shared/control.h"

enum { MSG_REQ_PAGES_ID = 3, MSG_REQ_PAGES = 4, MSG_RECV_BITMAP = 5 };
enum { LARGEST_REQUEST = 4 + 12 + 1 + 255 };

/* The last `bytes` bytes of v, big-endian; what stands behind them. */
uint8_t *sp_put(uint8_t *to, uint64_t v, int bytes);
/* One request at `to`, with the block's name or without; its length.  It asks for whole pages of the
 * source's memory: QEMU's source asserts that from 8.0 on (migration/ram.c ram_save_queue_pages). */
size_t sp_put_request(const sp_control *c, uint8_t *to, const sp_desc *d, bool named);

#endif
