#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../native/uffd.h"
#include "../../native/uffd_abi.h"
#include "hold.h"

enum { PAGE_BYTES = 4096, ADDRESS_ROOM = 32 };

static const char ATTACH[] = "{\"attach\": {\"version\": 1, \"modes\": "
                             "[\"missing\", \"missing+minor\"]}}\n";

void sp_say(const char *format, ...)
{
    char line[640] = "sharded_pc preload: ";
    size_t n = strlen(line);
    va_list args;
    va_start(args, format);
    int more = vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    n += more > 0 ? (size_t)more : 0;
    n = n < sizeof line - 2 ? n : sizeof line - 2;
    line[n++] = '\n';
    if (write(STDERR_FILENO, line, n) < 0)
        return; /* nobody to tell */
}

static int refused(const sp_message *message, sp_trouble *trouble)
{
    char text[256];
    sp_text_print(text, sizeof text, message->desc);
    return sp_fail(trouble, "the receiver refused: %s", text);
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
    if (message->kind == SP_SAYS_ERROR)
        return refused(message, trouble);
    if (message->kind == SP_SAYS_FAILED) {
        char text[256];
        sp_text_print(text, sizeof text, message->desc);
        return sp_fail(trouble, "the migration failed: %s", text);
    }
    return sp_fail(trouble, "the receiver said what the attach protocol does not allow");
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
    for (unsigned i = 0; i < guest->n_segments; i++) {
        const sp_segment *segment = &guest->segments[i];
        int found = find_right(guest, segment);
        if (found < 0)
            return sp_fail(trouble, "%s is not memory of this receiver", segment->path);
        blocks[i] = &offer->blocks[found];
        if (blocks[i]->size != segment->size)
            return sp_fail(trouble, "%s has %" PRIu64 " bytes, its block %" PRIu64, segment->path,
                           segment->size, blocks[i]->size);
    }
    return 0;
}

static int open_uffds(sp_guest *guest, uint64_t shards, uint64_t mode, sp_trouble *trouble)
{
    uint64_t minor = mode & UFFDIO_REGISTER_MODE_MINOR ? UFFD_FEATURE_MINOR_SHMEM : 0;
    for (uint64_t i = 0; i < shards; i++) {
        sp_uffd_info info;
        int fd = sp_uffd_open(UFFD_FEATURE_MISSING_SHMEM | minor, 0, &info);
        if (fd < 0)
            return sp_fail(trouble, "open a userfaultfd that serves the kernel's faults too: %s; "
                                    "`sharded-pc check` names the remedy", strerror(-fd));
        guest->uffds[i] = fd;
    }
    return 0;
}

static int register_segment(const sp_guest *guest, const sp_segment *segment,
                            const sp_offer *offer, sp_trouble *trouble)
{
    uint64_t stripe = segment->first_stripe;
    for (uint64_t at = 0; at < segment->size; stripe++) {
        uint64_t left = segment->size - at;
        uint64_t len = left < offer->stripe_bytes ? left : offer->stripe_bytes;
        uint64_t addr = (uint64_t)(uintptr_t)segment->base + at;
        int rc = sp_uffd_register(guest->uffds[stripe % offer->shards], addr, len, offer->mode,
                                  NULL);
        if (rc < 0)
            return sp_fail(trouble, "register %s at offset %#" PRIx64 ": %s", segment->path, at,
                           strerror(-rc));
        at += len;
    }
    return 0;
}

static int register_all(sp_guest *guest, const sp_offer *offer, const sp_offered_block **blocks,
                        sp_trouble *trouble)
{
    if (open_uffds(guest, offer->shards, offer->mode, trouble))
        return -1;
    guest->stripe_bytes = offer->stripe_bytes;
    guest->shards = offer->shards;
    for (unsigned i = 0; i < guest->n_segments; i++) {
        guest->segments[i].first_stripe = blocks[i]->first_stripe;
        if (register_segment(guest, &guest->segments[i], offer, trouble))
            return -1;
    }
    sp_hold_arm(guest, offer->mode);
    return 0;
}

/* Is this what we registered?  Another shard map would wait on userfaultfds that nobody reads. */
static int check_same(const sp_guest *guest, const sp_offer *offer, const sp_offered_block **blocks,
                      sp_trouble *trouble)
{
    int same = guest->stripe_bytes == offer->stripe_bytes && guest->shards == offer->shards;
    for (unsigned i = 0; same && i < guest->n_segments; i++)
        same = guest->segments[i].first_stripe % guest->shards ==
               blocks[i]->first_stripe % guest->shards;
    return same ? 0 : sp_fail(trouble, "the receiver deals the memory to other shards than before");
}

static int send_mappings(sp_guest *guest, const sp_offer *offer, const sp_offered_block **blocks,
                         uint64_t deadline, sp_trouble *trouble)
{
    size_t room = ADDRESS_ROOM * 2;
    for (unsigned i = 0; i < guest->n_segments; i++)
        room += blocks[i]->name.len + ADDRESS_ROOM;
    char *data = malloc(room);
    if (!data)
        return sp_fail(trouble, "no memory");
    size_t n = (size_t)sprintf(data, "{\"mappings\": {\"addresses\": {");
    for (unsigned i = 0; i < guest->n_segments; i++)
        n += (size_t)sprintf(data + n, "%s\"%.*s\": %" PRIuPTR, i ? ", " : "",
                             (int)blocks[i]->name.len, blocks[i]->name.at,
                             (uintptr_t)guest->segments[i].base);
    n += (size_t)sprintf(data + n, "}}}\n");
    int rc = sp_channel_send(&guest->channel, data, n, guest->uffds,
                             offer->mode ? (unsigned)guest->shards : 0, deadline, trouble);
    free(data);
    return rc;
}

static int hand_over(sp_guest *guest, const sp_offer *offer, uint64_t deadline,
                     sp_trouble *trouble)
{
    const sp_offered_block *blocks[SP_MAX_RIGHTS];
    if (check_offer(offer, guest->channel.n_rights, trouble) ||
        match(guest, offer, blocks, trouble))
        return -1;
    sp_channel_drop_rights(&guest->channel);
    if (offer->mode && guest->shards == 0 && register_all(guest, offer, blocks, trouble))
        return -1;
    if (offer->mode && check_same(guest, offer, blocks, trouble))
        return -1;
    return send_mappings(guest, offer, blocks, deadline, trouble);
}

static int converse(sp_guest *guest, sp_message *message, uint64_t deadline, sp_trouble *trouble)
{
    if (sp_channel_open(&guest->channel, guest->socket_path, deadline, trouble) ||
        sp_channel_send(&guest->channel, ATTACH, sizeof ATTACH - 1, NULL, 0, deadline, trouble) ||
        expect(guest, SP_SAYS_GEOMETRY, message, deadline, trouble))
        return -1;
    int over = message->offer.mode == 0;
    if (hand_over(guest, &message->offer, deadline, trouble) ||
        expect(guest, SP_SAYS_ATTACHED, message, deadline, trouble))
        return -1;
    /* Without a mode nothing is registered by this hand-over: only COMPLETED makes that right. */
    if (over && expect(guest, SP_SAYS_COMPLETED, message, deadline, trouble))
        return -1;
    return over;
}

void sp_guest_complete(sp_guest *guest)
{
    sp_channel_close(&guest->channel);
    for (uint64_t i = 0; i < guest->shards; i++)
        close(guest->uffds[i]);
    guest->shards = 0;
    sp_hold_end(guest);
    atomic_store(&guest->completed, 1);
}

int sp_guest_attach(sp_guest *guest, uint64_t deadline, sp_trouble *trouble)
{
    sp_message *message = malloc(sizeof *message);
    if (!message)
        return sp_fail(trouble, "no memory");
    int rc = converse(guest, message, deadline, trouble);
    if (rc > 0)
        sp_guest_complete(guest);
    else if (rc < 0)
        sp_channel_close(&guest->channel);
    free(message);
    return rc < 0 ? -1 : 0;
}
