/* The records of a `ram` section: the C twin of wire/ram.py.
 *
 * Reads be64 (offset | flags) records until EOS and hands pages on.  Before LISTENING a page goes
 * into its RAMBlock's segment by pwritev (precopy.c): no mapping, so a full tmpfs is ENOSPC and not
 * SIGBUS.  From LISTENING on it goes into a tmp page of its shard (`copy`) or into its RAMBlock
 * through an alias mapping (`continue`, straight.c, before LISTENING too), and a descriptor into the
 * shard's ring (route.c).
 */
#ifndef SP_RAM_H
#define SP_RAM_H

#include "stream/state.h"

sp_ram *sp_ram_new(sp_stream *s, sp_control *c, sp_word *received, sp_word *requested,
                   uint8_t *pool, _Atomic uint32_t *stop);
void sp_ram_free(sp_ram *r);
/* `continue`: pages go straight into their blocks.  Before the first record; every block needs its
 * alias as well. */
void sp_ram_go_straight(sp_ram *r, sp_word *written);
/* `r` reads the channel of postcopy-preempt, beside `main`, which outlives its loop. */
void sp_ram_preempt(sp_ram *r, sp_ram *main);
/* A new section or a new channel: the next record must name its block (QEMU resets at setup). */
void sp_ram_forget_block(sp_ram *r);
/* Reads records until EOS, MEM_SIZE or trouble; or until a compressed page, whose bytes are
 * r->compressed then. */
sp_status sp_ram_records(sp_ram *r);
/* After SP_COMPRESSED: these are its 4096 bytes.  The core does without zlib, which only sources
 * before QEMU 9.1 ask for. */
sp_status sp_ram_inflated(sp_ram *r, const uint8_t *page);

#endif
