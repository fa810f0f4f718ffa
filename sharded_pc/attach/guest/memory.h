/* The receiver's files as this process has them mapped: registered while pages are missing, an
 * ordinary process's memory again when all are here. */
#ifndef SP_MEMORY_H
#define SP_MEMORY_H

#include <stdint.h>
#include <sys/types.h>

#include "channel.h"

/* One file of the receiver's, and where this process has mapped it. */
typedef struct sp_segment {
    char *path; /* or what else people know it by */
    dev_t dev;
    ino_t ino;
    uint64_t size;         /* bytes */
    uint8_t *base;         /* NULL until mapped */
    int prot;              /* as the process asked for it (preload.c) */
    uint64_t first_stripe; /* once registered */
    int dont_fork, no_huge; /* as the process asked for it (hold.c) */
} sp_segment;

typedef struct sp_memory {
    sp_segment *segments;
    unsigned n_segments;
    int user_only_ok;      /* nothing but this process's own code reads the memory */
    unsigned ready;        /* of `uffds`, opened ahead by who may not be able to open or to register
                            * any when it comes to it: then the receiver's workers register */
    uint64_t mode;         /* as registered; 0: nothing is */
    uint64_t stripe_bytes, shards;
    int uffds[SP_MAX_RIGHTS]; /* our own copies, one for each shard */
} sp_memory;

/* Registers every segment, of which blocks[i] is what the receiver says of segment i; no child gets
 * the memory from then on, and no huge page fills its holes.  0, or -1 and the reason. */
int sp_memory_register(sp_memory *memory, const sp_offer *offer, const sp_offered_block **blocks,
                       sp_trouble *trouble);

/* Is this what was registered?  Another shard map would wait on userfaultfds that nobody reads. */
int sp_memory_check_same(const sp_memory *memory, const sp_offer *offer,
                         const sp_offered_block **blocks, sp_trouble *trouble);

/* Closes the userfaultfds.  If pages are missing and nobody else has copies, whoever waits for one
 * reads zeros. */
void sp_memory_close(sp_memory *memory);

/* Undoes what registering did for children and huge pages, but what the process asked for itself. */
void sp_memory_let_go(const sp_memory *memory);

/* The memory stands on huge pages, but was mapped page by page as it came: maps them whole. */
void sp_memory_collapse(const sp_memory *memory);

#endif
