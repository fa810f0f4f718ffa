/* Pages that arrive before LISTENING (`copy`). */
#ifndef SP_PRECOPY_H
#define SP_PRECOPY_H

#include "stream/state.h"

sp_status sp_precopy_page(sp_ram *r, const uint8_t *bytes);
sp_status sp_precopy_zero(sp_ram *r, uint64_t page);
sp_status sp_precopy_flush(sp_ram *r);

#endif
