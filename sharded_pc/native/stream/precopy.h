/* Pages that arrive before LISTENING (`copy`; encoded ones with `continue` as well). */
#ifndef SP_PRECOPY_H
#define SP_PRECOPY_H

#include "stream/state.h"

sp_status sp_precopy_page(sp_ram *r, const uint8_t *bytes);
sp_status sp_precopy_zero(sp_ram *r, uint64_t page);
/* The record's page of a block is changed by an encoded difference; everything before it was flushed. */
sp_status sp_precopy_xbzrle(sp_ram *r, uint32_t block, const uint8_t *encoded, size_t n);
/* One whole page of r->block; everything before it was flushed. */
sp_status sp_precopy_whole(sp_ram *r, uint64_t page, const uint8_t *bytes);
sp_status sp_precopy_flush(sp_ram *r);

#endif
