/* A fault loop asks the source itself while nobody else writes on the return path. */
#ifndef SP_REQUEST_H
#define SP_REQUEST_H

#include "shared/control.h"

/* One REQ_PAGES_ID for one page from a fault loop of this shard; fd: the wire.  It goes whole or not
 * at all, even if the process is killed in the middle.  False: not sent, the ring has to take it. */
bool sp_rp_request(sp_control *c, int fd, uint32_t shard, uint32_t block, uint64_t page);

#endif
