/* A packet of multifd: 1344 bytes that say which pages follow, or that this is a SYNC.
 * QEMU migration/multifd.h, MultiFDPacket_t; the array of offsets has always its whole length. */
#ifndef SP_PACKET_H
#define SP_PACKET_H

#include "shared/control.h"
#include "shared/status.h"

#define SP_PACKET_MOST_PAGES 128u /* MULTIFD_PACKET_SIZE / 4096 */
#define SP_PACKET_BYTES (320u + 8u * SP_PACKET_MOST_PAGES)
#define SP_PACKED_MOST_BYTES (2u * SP_PACKET_MOST_PAGES * SP_PAGE_BYTES) /* QEMU's zbuff_len */

enum {
    SP_PACKET_SYNC = 1,
    SP_PACKET_ZLIB = 2,
    SP_PACKET_ZSTD = 4,
    SP_PACKET_METHOD = 0x3e /* MULTIFD_FLAG_COMPRESSION_MASK */
};

typedef struct sp_packet {
    uint32_t flags, normal, zero, bytes; /* pages with data, pages of zeros, payload behind it */
    uint64_t number;
    uint32_t block;
    uint64_t page[SP_PACKET_MOST_PAGES]; /* page numbers in the block: normal ones, then zeros */
} sp_packet;

/* Where a packet is not good: the value that is not, and what it must not exceed or must be. */
typedef struct sp_packet_fault {
    uint64_t value, limit;
    char name[256];
} sp_packet_fault;

/* SP_OK, or SP_PACKET_*. */
sp_status sp_packet_parse(const sp_control *c, const uint8_t raw[SP_PACKET_BYTES], sp_packet *p,
                          sp_packet_fault *fault);

#endif
