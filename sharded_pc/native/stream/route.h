/* Payload to its resting place. */
#ifndef SP_ROUTE_H
#define SP_ROUTE_H

#include "stream/state.h"

/* One whole page of r->block, from elsewhere than the stream's buffer; runs before it were handed on. */
sp_status sp_route_whole(sp_ram *r, uint64_t page, const uint8_t *bytes);
sp_status sp_route_payload(sp_ram *r); /* goes on with the current page's payload */
/* Reads what probably comes next; *bet is false, and nothing is read, if nothing can be bet on. */
sp_status sp_route_ahead(sp_ram *r, bool *bet);

#endif
