#define _GNU_SOURCE
#include "guest.h"

#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, ADDRESS_ROOM = 32, SAY_MS = 100 };

#define ATTACH "{\"attach\": {\"version\": 1, \"modes\": [\"missing\", \"missing+minor\"]"

static const char HELLO[] = ATTACH "}}\n";
/* A destination maps its memory backends before anything is known of the source. */
static const char EARLY[] = ATTACH ", \"early\": true}}\n";

void sp_say(const char *who, const char *format, ...)
{
    char line[640];
    size_t n = (size_t)snprintf(line, sizeof line / 2, "%s: ", who);
    va_list args;
    va_start(args, format);
    int more = vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    n += more > 0 ? (size_t)more : 0;
    n = n < sizeof line - 2 ? n : sizeof line - 2;
    line[n++] = '\n';
    /* Who does not read what is said must not keep a guest from attaching again. */
    struct pollfd pfd = {.fd = STDERR_FILENO, .events = POLLOUT};
    struct timespec patience = {.tv_nsec = SAY_MS * 1000000L};
    if (ppoll(&pfd, 1, &patience, NULL) <= 0 || write(STDERR_FILENO, line, n) < 0)
        return; /* nobody to tell */
}

int sp_guest_object(const sp_message *message, const char *does, sp_trouble *trouble)
{
    char text[400];
    sp_text_print(text, sizeof text, message->desc);
    if (message->kind == SP_SAYS_FAILED)
        return sp_fail(trouble, "the migration failed: %s", text);
    if (message->kind != SP_SAYS_ERROR)
        return sp_fail(trouble, "the receiver said what the attach protocol does not allow");
    return sp_fail(trouble, "the receiver %s: %s", does, text);
}

/* The next message, which must be of this kind. */
static int expect(sp_guest *guest, sp_kind kind, sp_message *message, uint64_t deadline,
                  sp_trouble *trouble)
{
    int rc = sp_channel_receive(&guest->channel, message, deadline, trouble);
    if (rc < 0)
        return -1;
    if (rc == 0)
        return sp_fail(trouble, "the receiver closed the attach socket");
    if (message->kind == kind)
        return 0;
    return sp_guest_object(message, "refused", trouble);
}

static int check_offer(const sp_offer *offer, unsigned n_rights, sp_trouble *trouble)
{
    if (offer->version != SP_ATTACH_VERSION)
        return sp_fail(trouble, "geometry version %" PRIu64 ", expected %d", offer->version,
                       SP_ATTACH_VERSION);
    if (offer->mode == SP_MODE_UNKNOWN)
        return sp_fail(trouble, "the receiver wants a mode that this library does not know");
    if (offer->shards < 1 || offer->shards > SP_MAX_RIGHTS)
        return sp_fail(trouble, "%" PRIu64 " shards, expected 1 to %d", offer->shards,
                       SP_MAX_RIGHTS);
    if (offer->stripe_bytes == 0 || offer->stripe_bytes % PAGE_BYTES)
        return sp_fail(trouble, "stripes of %" PRIu64 " bytes, expected whole pages",
                       offer->stripe_bytes);
    if (offer->n_blocks != n_rights)
        return sp_fail(trouble, "%u descriptors came for %u blocks", n_rights, offer->n_blocks);
    return 0;
}

/* Which descriptor is this file's; -1: none. */
static int find_right(const sp_guest *guest, const sp_segment *segment)
{
    for (unsigned i = 0; i < guest->channel.n_rights; i++) {
        struct stat st;
        if (fstat(guest->channel.rights[i], &st) == 0 && st.st_dev == segment->dev &&
            st.st_ino == segment->ino)
            return (int)i;
    }
    return -1;
}

/* blocks[i] becomes the block of segment i. */
static int match(sp_guest *guest, const sp_offer *offer, const sp_offered_block **blocks,
                 sp_trouble *trouble)
{
    for (unsigned i = 0; i < guest->memory.n_segments; i++) {
        const sp_segment *segment = &guest->memory.segments[i];
        int found = find_right(guest, segment);
        if (found < 0)
            return sp_fail_as(trouble, SP_CAUSE_STRANGER, "%s is not memory of this receiver",
                              segment->path);
        blocks[i] = &offer->blocks[found];
        if (blocks[i]->size != segment->size)
            return sp_fail_as(trouble, SP_CAUSE_STRANGER, "%s has %" PRIu64 " bytes, its block %"
                              PRIu64, segment->path, segment->size, blocks[i]->size);
    }
    return 0;
}

static int send_mappings(sp_guest *guest, const sp_offer *offer, const sp_offered_block **blocks,
                         uint64_t deadline, sp_trouble *trouble)
{
    size_t room = ADDRESS_ROOM * 2;
    for (unsigned i = 0; i < guest->memory.n_segments; i++)
        room += blocks[i]->name.len + ADDRESS_ROOM;
    char *data = malloc(room);
    if (!data)
        return sp_fail(trouble, "no memory");
    size_t n = (size_t)sprintf(data, "{\"mappings\": {\"addresses\": {");
    for (unsigned i = 0; i < guest->memory.n_segments; i++)
        n += (size_t)sprintf(data + n, "%s\"%.*s\": %" PRIuPTR, i ? ", " : "",
                             (int)blocks[i]->name.len, blocks[i]->name.at,
                             (uintptr_t)guest->memory.segments[i].base);
    n += (size_t)sprintf(data + n, "}}}\n");
    int rc = sp_channel_send(&guest->channel, data, n, guest->memory.uffds,
                             offer->mode ? (unsigned)guest->memory.shards : 0, deadline, trouble);
    free(data);
    return rc;
}

int sp_guest_open(sp_guest *guest, uint64_t deadline, sp_trouble *trouble)
{
    if (guest->kind->open)
        return guest->kind->open(guest, deadline, trouble);
    if (sp_channel_open(&guest->channel, guest->socket_path, deadline, trouble))
        return -1;
    const char *hello = guest->bound ? EARLY : HELLO;
    return sp_channel_send(&guest->channel, hello, strlen(hello), NULL, 0, deadline, trouble);
}

int sp_guest_join(sp_guest *guest, const sp_message *geometry, uint64_t deadline,
                  sp_trouble *trouble)
{
    const sp_offer *offer = &geometry->offer;
    const sp_offered_block *blocks[SP_MAX_RIGHTS];
    if (check_offer(offer, guest->channel.n_rights, trouble) ||
        match(guest, offer, blocks, trouble))
        return -1;
    sp_channel_drop_rights(&guest->channel);
    if (offer->mode && !guest->memory.mode &&
        sp_memory_register(&guest->memory, offer, blocks, trouble))
        return -1;
    if (offer->mode && sp_memory_check_same(&guest->memory, offer, blocks, trouble))
        return -1;
    return send_mappings(guest, offer, blocks, deadline, trouble);
}

static int converse(sp_guest *guest, sp_message *message, uint64_t deadline, sp_trouble *trouble)
{
    if (sp_guest_open(guest, deadline, trouble) ||
        expect(guest, SP_SAYS_GEOMETRY, message, deadline, trouble))
        return -1;
    int over = message->offer.mode == 0;
    if (guest->kind->map && !guest->memory.n_segments &&
        guest->kind->map(guest, message, trouble))
        return -1;
    if (sp_guest_join(guest, message, deadline, trouble) ||
        expect(guest, SP_SAYS_ATTACHED, message, deadline, trouble))
        return -1;
    guest->number = message->guest;
    /* Without a mode nothing is registered by this hand-over: only COMPLETED makes that right. */
    if (over && expect(guest, SP_SAYS_COMPLETED, message, deadline, trouble))
        return -1;
    guest->attached = 1;
    if (over)
        sp_guest_complete(guest, message->huge);
    return 0;
}

void sp_guest_complete(sp_guest *guest, int huge_pages)
{
    sp_channel_close(&guest->channel);
    sp_memory_close(&guest->memory);
    if (guest->kind->let_go)
        guest->kind->let_go(guest);
    else
        sp_memory_let_go(&guest->memory);
    if (huge_pages)
        sp_memory_collapse(&guest->memory);
    atomic_store(&guest->completed, 1);
}

int sp_guest_attach(sp_guest *guest, uint64_t deadline, sp_trouble *trouble)
{
    sp_message message;
    int rc = converse(guest, &message, deadline, trouble);
    if (rc < 0)
        sp_channel_close(&guest->channel);
    return rc;
}
