/* `continue`: makes pages that stand in their block visible to guests. */
#ifndef SP_AHEAD_H
#define SP_AHEAD_H

#include "shard/worker.h"

/* Pages that stand in their block become visible to every guest (`continue`). */
void sp_map_arrived(sp_worker *w, uint32_t block, uint64_t page, uint64_t pages, uint32_t kind);
/* One stripe of one guest that has not been told of pages that came before it; false: none left. */
bool sp_map_ahead(sp_worker *w);

#endif
