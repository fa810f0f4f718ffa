/* Compressed payloads.  A channel is one stream of zlib or zstd from its first packet to its last,
 * flushed behind each (QEMU migration/multifd-zlib.c, multifd-zstd.c). */
#ifndef SP_UNPACK_H
#define SP_UNPACK_H

#include <stddef.h>
#include <stdint.h>

typedef struct sp_unpack sp_unpack;

/* Whether this build can unpack a method (SP_PACKET_ZLIB, SP_PACKET_ZSTD). */
int sp_unpack_knows(uint32_t method);
/* NULL: no memory, or a method that this build does not know. */
sp_unpack *sp_unpack_new(uint32_t method);
void sp_unpack_free(sp_unpack *u);
/* Exactly n bytes out of exactly size; 0, or -1: these are no such bytes. */
int sp_unpack_some(sp_unpack *u, const uint8_t *packed, size_t size, uint8_t *out, size_t n);

#endif
