/* Requests that are outstanding: of every page that is requested and not received.
 *
 * A request can be lost: with a connection, or with a fault loop that died between the claim and the
 * wire.  So `again` asks for every page that is requested and not received; a source takes repeated
 * requests well.
 */
#ifndef SP_BACK_OUTSTANDING_H
#define SP_BACK_OUTSTANDING_H

#include <stdbool.h>

#include "back/state.h"

/* The next run of pages to ask for again, from the first on if `again` was set; false: there is none
 * any more. */
bool sp_rp_next_outstanding(sp_return_path *rp, sp_desc *d);

#endif
