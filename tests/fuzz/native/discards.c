/* Discard messages in the stream's buffer: the first byte chooses the placement, the rest stands at the
 * buffer's very end, so that the sanitizer sees a byte too far.  What is taken is whole messages. */
#include <string.h>

#include "check.h"
#include "fuzz.h"
#include "reader.h"

enum { SECTION_AND_COMMAND = 3, HEAD = 5 };
static const uint8_t DISCARD[SECTION_AND_COMMAND] = {8, 0, 6};

/* What was taken is a row of commands, by their lengths alone. */
static void check_taken(const uint8_t *data, size_t taken)
{
    for (size_t at = 0; at < taken;) {
        CHECK(taken - at >= HEAD && memcmp(data + at, DISCARD, sizeof DISCARD) == 0);
        at += HEAD + ((size_t)data[at + 3] << 8 | data[at + 4]);
        CHECK(at <= taken);
    }
}

static void receive_everything(world *w)
{
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        sp_bits_set(w->received, w->control->blocks[b].first_bit, WORLD_PAGES[b]);
}

static uint64_t missing(const world *w)
{
    uint64_t n = 0;
    for (uint32_t b = 0; b < WORLD_BLOCKS; b++)
        n += WORLD_PAGES[b] - sp_bits_count(w->received, w->control->blocks[b].first_bit, WORLD_PAGES[b]);
    return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0 || size > SP_STREAM_BUFFER)
        return 0;
    world *w = reader_new(0, data[0] & 1);
    sp_stream *s = w->stream;
    receive_everything(w);
    s->end = sizeof s->buf;
    s->pos = s->end - --size;
    if (size)
        memcpy(s->buf + s->pos, ++data, size);
    CHECK_EQ(sp_discards_ahead(w->ram), SP_OK);
    reader_work(w);
    check_taken(data, size - sp_stream_unread(s));
    CHECK(missing(w) <= w->control->totals.discarded);
    reader_check(w);
    return 0;
}
