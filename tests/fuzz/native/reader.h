/* A reader on a world (tests/native/world.h) whose worker works whenever it is waited for. */
#ifndef READER_H
#define READER_H

#include "world.h"

/* A world for this input, valid until the next call; `straight`: 1 for `continue`, 0 for `copy`. */
world *reader_new(int postcopy, int straight);
/* What the worker does: empties the rings and checks what stands there. */
size_t reader_work(world *w);
/* Nothing is marked behind a block's end, and no segment has grown. */
void reader_check(const world *w);

#endif
