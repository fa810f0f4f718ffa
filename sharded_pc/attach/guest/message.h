/* The attach protocol's messages as the receiver says them (attach/protocol.py is the contract).
 *
 * A strict reader of JSON that knows only the keys we need: other keys are skipped, anything that is
 * no JSON is refused.  Nothing is copied: texts point into the bytes that were read.
 */
#ifndef SP_MESSAGE_H
#define SP_MESSAGE_H

#include <stddef.h>
#include <stdint.h>

enum {
    SP_ATTACH_VERSION = 1,
    SP_MAX_RIGHTS = 253, /* SCM_MAX_FD, the kernel's limit for one message */
};

#define SP_MODE_UNKNOWN UINT64_MAX

/* A JSON string as it stands between its quotes, escapes and all. */
typedef struct sp_text {
    const char *at;
    size_t len;
} sp_text;

typedef struct sp_offered_block {
    sp_text name;
    uint64_t size; /* bytes */
    uint64_t first_stripe;
} sp_offered_block;

typedef struct sp_offer {
    uint64_t version;
    uint64_t mode; /* UFFDIO_REGISTER_MODE_* bits; 0: everything has arrived */
    uint64_t stripe_bytes;
    uint64_t shards;
    unsigned n_blocks;
    sp_offered_block blocks[SP_MAX_RIGHTS];
} sp_offer;

typedef enum sp_kind {
    SP_SAYS_OTHER = 0, /* JSON, but none of these */
    SP_SAYS_GEOMETRY,
    SP_SAYS_ATTACHED,
    SP_SAYS_READY,
    SP_SAYS_COMPLETED,
    SP_SAYS_FAILED,
    SP_SAYS_ERROR,
} sp_kind;

typedef struct sp_message {
    sp_kind kind;
    sp_text desc;   /* of an error or FAILED */
    int huge;       /* of COMPLETED: the memory stands on huge pages */
    int64_t guest;  /* of "attached": the receiver's number for us; -1: it needs none */
    sp_offer offer; /* of a geometry */
} sp_message;

/* Where a reader of a stream of JSON objects stands; start with zeros. */
typedef struct sp_cut {
    size_t scanned; /* bytes looked at since the object's begin */
    unsigned depth;
    int in_string, escaped;
} sp_cut;

/* Length of the first whole object in buf (white space before it counts), 0 if its end has not come
 * yet, -1 if it cannot be one.  Goes on where it stopped; `cut` is zero again after a whole one. */
long sp_message_end(sp_cut *cut, const char *buf, size_t len);

/* 0, or -1 if these bytes are not one JSON object of the shape that its key promises. */
int sp_message_parse(const char *buf, size_t len, sp_message *message);

/* Writes a text for people, in UTF-8: escapes undone but those of control characters, which a terminal
 * must not get, and of no character; cut to fit, always terminated. */
void sp_text_print(char *dst, size_t room, sp_text text);

#endif
