/* A receiver's memory without a worker: control segment, bitmaps, tmp pages, a socket, a reader.
 *
 * Every buffer has exactly the size that its users were promised, so that the sanitizer sees a byte
 * too far.  world_work() does what a placement loop does, into `image`.
 */
#ifndef WORLD_H
#define WORLD_H

#include "shared/control.h"
#include "stream/discards.h"
#include "stream/hand.h"
#include "stream/ram.h"
#include "stream/straight.h"

enum { WORLD_SHARDS = 2, WORLD_BLOCKS = 2, WORLD_STRIPE = 64 };
static const uint64_t WORLD_PAGES[WORLD_BLOCKS] = {200, 3};

typedef struct world {
    sp_control *control;
    sp_word *received, *requested, *written;
    uint8_t *pool;
    _Atomic uint32_t *stop;
    int wire[2]; /* ours, the reader's */
    sp_stream *stream;
    sp_ram *ram;
    int fd[WORLD_BLOCKS];         /* segments */
    uint8_t *image[WORLD_BLOCKS]; /* where world_work places */
    uint64_t discarded;
} world;

sp_control *new_control(uint32_t n_shards);
world *world_new(int postcopy);
void world_free(world *w);
/* As new, but for what stands in memory: cheaper than another one. */
void world_renew(world *w, int postcopy);
/* `continue`: pages go into the segments, pages that may not be touched around each alias. */
void world_go_straight(world *w);
void world_send(world *w, const void *bytes, size_t n);
/* Sends be64 (offset | flags) and, unless NULL, a block's name. */
void world_header(world *w, uint64_t value, const char *name);
/* Empties the rings; returns how many descriptors there were. */
size_t world_work(world *w);
uint64_t world_bit(const world *w, uint32_t block, uint64_t page);

#endif
