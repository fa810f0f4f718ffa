/* The loop of one channel of multifd, on a thread of the worker that was given it.
 *
 * Calls go loop -> unpack, land -> packet.  It reads whole packets, and ends with the channel: at its
 * end, at a bad packet, or when its socket is shut down; why stands in the control segment.
 */
#ifndef SP_MULTIFD_LOOP_H
#define SP_MULTIFD_LOOP_H

#include "shared/control.h"

typedef struct sp_multifd sp_multifd;

/* `fd`: blocking, behind the 64 bytes of the opening.  `written`: NULL with `copy`. */
sp_multifd *sp_multifd_new(sp_control *c, uint32_t number, int fd, sp_word *received,
                           sp_word *written);
void sp_multifd_free(sp_multifd *m);
void sp_multifd_use_block(sp_multifd *m, uint32_t block, int fd);
/* What comes is written down too, before anybody parses it; `fd` stays the caller's. */
void sp_multifd_record(sp_multifd *m, int fd);
void sp_multifd_run(sp_multifd *m);
/* From another thread. */
void sp_multifd_stop(sp_multifd *m);

#endif
