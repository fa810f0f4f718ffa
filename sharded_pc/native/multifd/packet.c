#include "multifd/packet.h"

#include <string.h>

enum { MAGIC = 0x11223344, VERSION = 1, NUMBER_AT = 24, ZERO_AT = 32, NAME_AT = 64, OFFSETS_AT = 320 };

static uint32_t be32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return __builtin_bswap32(v);
}

static uint64_t be64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return __builtin_bswap64(v);
}

static sp_status bad(sp_packet_fault *fault, sp_status st, uint64_t value, uint64_t limit)
{
    fault->value = value;
    fault->limit = limit;
    return st;
}

static sp_status parse_counts(const uint8_t *raw, sp_packet *p, sp_packet_fault *fault)
{
    uint32_t room = be32(raw + 12);
    p->normal = be32(raw + 16);
    p->bytes = be32(raw + 20);
    p->zero = be32(raw + ZERO_AT);
    if (room > SP_PACKET_MOST_PAGES)
        return bad(fault, SP_PACKET_PAGES, room, SP_PACKET_MOST_PAGES);
    if (p->normal > room || p->zero > room - p->normal)
        return bad(fault, SP_PACKET_PAGES, (uint64_t)p->normal + p->zero, room);
    return SP_OK;
}

/* What an empty packet says of a payload is left over from the one before it. */
static sp_status check_size(const sp_packet *p, sp_packet_fault *fault)
{
    uint32_t method = p->flags & SP_PACKET_METHOD, plain = p->normal * SP_PAGE_BYTES;
    if (p->normal == 0)
        return SP_OK;
    if (method == 0 && p->bytes != plain)
        return bad(fault, SP_PACKET_SIZE, p->bytes, plain);
    if (method && (p->bytes == 0 || p->bytes > SP_PACKED_MOST_BYTES))
        return bad(fault, SP_PACKET_SIZE, p->bytes, SP_PACKED_MOST_BYTES);
    return SP_OK;
}

static sp_status parse_pages(const sp_control *c, const uint8_t *raw, sp_packet *p,
                             sp_packet_fault *fault)
{
    size_t len = strnlen((const char *)raw + NAME_AT, 256);
    int block = len && len < 256 ? sp_control_find(c, raw + NAME_AT, len) : -1;
    memcpy(fault->name, raw + NAME_AT, 255);
    fault->name[255] = 0;
    if (block < 0)
        return bad(fault, SP_PACKET_BLOCK, 0, 0);
    p->block = (uint32_t)block;
    uint64_t bytes = c->blocks[block].bytes;
    for (uint32_t i = 0; i < p->normal + p->zero; i++) {
        uint64_t offset = be64(raw + OFFSETS_AT + 8 * i);
        if (offset % SP_PAGE_BYTES || offset >= bytes)
            return bad(fault, SP_PACKET_OFFSET, offset, bytes);
        p->page[i] = offset / SP_PAGE_BYTES;
    }
    return SP_OK;
}

sp_status sp_packet_parse(const sp_control *c, const uint8_t raw[SP_PACKET_BYTES], sp_packet *p,
                          sp_packet_fault *fault)
{
    memset(fault, 0, sizeof *fault);
    if (be32(raw) != MAGIC)
        return bad(fault, SP_PACKET_MAGIC, be32(raw), MAGIC);
    if (be32(raw + 4) != VERSION)
        return bad(fault, SP_PACKET_VERSION, be32(raw + 4), VERSION);
    p->flags = be32(raw + 8);
    if (p->flags & ~(uint32_t)(SP_PACKET_SYNC | SP_PACKET_ZLIB | SP_PACKET_ZSTD))
        return bad(fault, SP_PACKET_KIND, p->flags, 0);
    p->number = be64(raw + NUMBER_AT);
    sp_status st = parse_counts(raw, p, fault);
    if (st == SP_OK)
        st = check_size(p, fault);
    if (st == SP_OK && p->normal + p->zero)
        st = parse_pages(c, raw, p, fault);
    return st;
}
