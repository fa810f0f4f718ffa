/* Writing to the wire, by who has the writer's word. */
#ifndef SP_BACK_WIRE_H
#define SP_BACK_WIRE_H

#include "back/state.h"
#include "shared/status.h"

/* A stopped receiver waits so long for a stuck peer. */
enum { SP_WIRE_STUCK_MS = 200 };

/* Writes what is in `out`, which is empty afterwards, whatever became of it. */
sp_status sp_rp_flush(sp_return_path *rp);

#endif
