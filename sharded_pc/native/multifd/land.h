/* Pages of a packet into their RAMBlock, before anybody may look at it.
 *
 * By descriptor: a store into a full tmpfs would be SIGBUS. */
#ifndef SP_LAND_H
#define SP_LAND_H

#include "multifd/packet.h"

typedef struct sp_land {
    sp_control *control;
    sp_word *received;
    sp_word *written;            /* `continue`, else NULL */
    int block_fd[SP_MAX_BLOCKS]; /* segments */
    int err;                     /* errno after SP_SYS */
} sp_land;

/* `n` pages of the packet from its page `first` on, whose data is `bytes`. */
sp_status sp_land_pages(sp_land *l, const sp_packet *p, uint32_t first, uint32_t n,
                        const uint8_t *bytes);
/* Its pages of zeros: some may hold an older version. */
sp_status sp_land_zeros(sp_land *l, const sp_packet *p);

#endif
