/* A guest's reader of what a receiver says: cut from the stream, then parsed.  Texts point
 * into the bytes that came, and cutting does not depend on how they came. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fuzz.h"
#include "../../../sharded_pc/attach/guest/message.h"

static void check_text(sp_text text, const char *bytes, size_t size)
{
    char room[8];
    if (text.at >= bytes && text.at < bytes + size)
        CHECK(text.len <= (size_t)(bytes + size - text.at));
    else
        CHECK(text.len == 0); /* a literal */
    memset(room, 'x', sizeof room);
    sp_text_print(room, sizeof room, text);
    CHECK(strnlen(room, sizeof room) < sizeof room);
}

static void check_offer(const sp_offer *offer, const char *bytes, size_t size)
{
    CHECK(offer->n_blocks <= SP_MAX_RIGHTS);
    for (unsigned i = 0; i < offer->n_blocks; i++) {
        CHECK(offer->blocks[i].size > 0 && offer->blocks[i].name.at);
        check_text(offer->blocks[i].name, bytes, size);
    }
}

/* In a buffer of its own, so that the sanitizer sees a byte too far. */
static void parse(const uint8_t *from, size_t size)
{
    char *bytes = malloc(size ? size : 1);
    sp_message *message = malloc(sizeof *message);
    memcpy(bytes, from, size);
    if (sp_message_parse(bytes, size, message) == 0) {
        check_text(message->desc, bytes, size);
        if (message->kind == SP_SAYS_GEOMETRY)
            check_offer(&message->offer, bytes, size);
    }
    free(message);
    free(bytes);
}

static long end_by_bytes(const char *bytes, size_t size)
{
    sp_cut cut = {0};
    for (size_t n = 1; n <= size; n++) {
        long end = sp_message_end(&cut, bytes, n);
        if (end)
            return end;
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    sp_cut cut = {0};
    long end = sp_message_end(&cut, (const char *)data, size);
    CHECK_EQ(end_by_bytes((const char *)data, size), end);
    CHECK(end >= -1 && end <= (long)size);
    parse(data, size);
    if (end > 0)
        parse(data, (size_t)end);
    return 0;
}
