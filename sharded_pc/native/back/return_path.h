/* The return path: what goes back to the source.
 *
 * A fault loop sends its request itself while nobody else writes: that spares a process and a
 * wake-up.  Otherwise it goes through its ring, and the loop here drains the rings into REQ_PAGES_ID
 * / REQ_PAGES messages and sends them together with what Python posts (PONG, SHUT, ...).  Within one
 * write a block's name is sent only when it changes.
 */
#ifndef SP_RETURN_PATH_H
#define SP_RETURN_PATH_H

#include <stddef.h>
#include <stdint.h>

#include "back/state.h"
#include "shared/status.h"

sp_return_path *sp_rp_new(sp_control *c, int fd);
void sp_rp_free(sp_return_path *rp);
/* Hands a whole message over; 0 or -ENOBUFS. */
int sp_rp_post(sp_return_path *rp, const uint8_t *msg, size_t len);
/* Requests may be sent from now on; those that are outstanding are sent first. */
void sp_rp_arm(sp_return_path *rp, const sp_word *received, const sp_word *requested);
/* Sends all outstanding requests once more; nothing if the path is not armed. */
void sp_rp_again(sp_return_path *rp);
/* Ends the loop after everything posted was sent. */
void sp_rp_stop(sp_return_path *rp);
sp_status sp_rp_loop(sp_return_path *rp);

#endif
