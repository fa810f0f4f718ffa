/* Discard messages. */
#ifndef SP_DISCARDS_H
#define SP_DISCARDS_H

#include "stream/state.h"

/* Applies the good discard messages that stand whole in the buffer; what follows them
 * stays.  Only where another discard is legal, and not inside a package. */
sp_status sp_discards_ahead(sp_ram *r);

#endif
