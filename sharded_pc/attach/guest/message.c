#include "message.h"

#include <stdbool.h>
#include <string.h>

#include "../../native/kernel/uffd_abi.h"

enum { MAX_DEPTH = 16 };

/* protocol.py's MODES. */
static const struct {
    const char *word;
    uint64_t bits;
} MODES[] = {{"missing", UFFDIO_REGISTER_MODE_MISSING},
    {"missing+minor", UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR}};

long sp_message_end(sp_cut *cut, const char *buf, size_t len)
{
    for (; cut->scanned < len; cut->scanned++) {
        char c = buf[cut->scanned];
        if (cut->in_string) {
            if (cut->escaped)
                cut->escaped = 0;
            else if (c == '\\')
                cut->escaped = 1;
            else if (c == '"')
                cut->in_string = 0;
            continue;
        }
        if (cut->depth == 0 && c != '{' && !memchr(" \t\r\n", c, 4))
            return -1;
        if (c == '"')
            cut->in_string = 1;
        else if (c == '{' || c == '[')
            cut->depth++;
        else if ((c == '}' || c == ']') && --cut->depth == 0) {
            long end = (long)cut->scanned + 1;
            memset(cut, 0, sizeof *cut);
            return end;
        }
    }
    return 0;
}

typedef struct reader {
    const char *at, *end;
} reader;

/* Every function below takes one thing from the reader, or answers false and the message is bad. */
typedef bool taker(reader *r, sp_text key, void *into);

static char next(reader *r)
{
    while (r->at < r->end && memchr(" \t\r\n", *r->at, 4))
        r->at++;
    return r->at < r->end ? *r->at : '\0';
}

static bool take(reader *r, char c)
{
    if (next(r) != c)
        return false;
    r->at++;
    return true;
}

static bool take_word(reader *r, const char *word)
{
    size_t len = strlen(word);
    if ((size_t)(r->end - r->at) < len || memcmp(r->at, word, len) != 0)
        return false;
    r->at += len;
    return true;
}

static bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static bool take_escape(reader *r)
{
    if (r->at == r->end || !memchr("\"\\/bfnrtu", *r->at, 9))
        return false;
    if (*r->at++ != 'u')
        return true;
    for (int i = 0; i < 4; i++)
        if (r->at == r->end || !is_hex(*r->at++))
            return false;
    return true;
}

static bool take_string(reader *r, sp_text *text)
{
    if (!take(r, '"'))
        return false;
    text->at = r->at;
    while (r->at < r->end && *r->at != '"') {
        unsigned char c = (unsigned char)*r->at++;
        if (c < 0x20 || c == 0x7f || (c == '\\' && !take_escape(r)))
            return false;
    }
    text->len = (size_t)(r->at - text->at);
    return take(r, '"');
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool take_u64(reader *r, uint64_t *value)
{
    const char *first = (next(r), r->at);
    *value = 0;
    for (; r->at < r->end && is_digit(*r->at); r->at++) {
        uint64_t digit = (uint64_t)(*r->at - '0');
        if (*value > (UINT64_MAX - digit) / 10)
            return false;
        *value = *value * 10 + digit;
    }
    bool whole = r->at == r->end || !memchr(".eE", *r->at, 3);
    return whole && r->at > first && (*first != '0' || r->at == first + 1);
}

static bool skip_number(reader *r)
{
    const char *first = r->at;
    while (r->at < r->end && (is_digit(*r->at) || memchr("+-.eE", *r->at, 5)))
        r->at++;
    return r->at > first;
}

static bool take_members(reader *r, taker *on_member, void *into);

static bool skip_deep(reader *r, int depth);

static bool skip_array(reader *r, int depth)
{
    if (take(r, ']'))
        return true;
    do
        if (!skip_deep(r, depth))
            return false;
    while (take(r, ','));
    return take(r, ']');
}

static bool skip_object(reader *r, int depth)
{
    sp_text key;
    if (take(r, '}'))
        return true;
    do
        if (!take_string(r, &key) || !take(r, ':') || !skip_deep(r, depth))
            return false;
    while (take(r, ','));
    return take(r, '}');
}

static bool skip_deep(reader *r, int depth)
{
    sp_text text;
    if (depth > MAX_DEPTH)
        return false;
    switch (next(r)) {
    case '"':
        return take_string(r, &text);
    case '{':
        return take(r, '{') && skip_object(r, depth + 1);
    case '[':
        return take(r, '[') && skip_array(r, depth + 1);
    case 't':
        return take_word(r, "true");
    case 'f':
        return take_word(r, "false");
    case 'n':
        return take_word(r, "null");
    default:
        return skip_number(r);
    }
}

static bool skip(reader *r)
{
    return skip_deep(r, 0);
}

static bool take_members(reader *r, taker *on_member, void *into)
{
    sp_text key;
    if (!take(r, '{'))
        return false;
    if (take(r, '}'))
        return true;
    do
        if (!take_string(r, &key) || !take(r, ':') || !on_member(r, key, into))
            return false;
    while (take(r, ','));
    return take(r, '}');
}

static bool is(sp_text text, const char *word)
{
    return text.len == strlen(word) && memcmp(text.at, word, text.len) == 0;
}

static bool on_block(reader *r, sp_text key, void *into)
{
    sp_offered_block *block = into;
    if (is(key, "name"))
        return take_string(r, &block->name);
    if (is(key, "size"))
        return take_u64(r, &block->size);
    if (is(key, "first-stripe"))
        return take_u64(r, &block->first_stripe);
    return skip(r);
}

static bool take_block(reader *r, sp_offer *offer)
{
    if (offer->n_blocks == SP_MAX_RIGHTS)
        return false;
    sp_offered_block *block = &offer->blocks[offer->n_blocks++];
    *block = (sp_offered_block){.first_stripe = UINT64_MAX};
    return take_members(r, on_block, block) && block->name.at && block->size &&
           block->first_stripe <= UINT64_MAX / 2;
}

static bool take_blocks(reader *r, sp_offer *offer)
{
    if (!take(r, '['))
        return false;
    do
        if (!take_block(r, offer))
            return false;
    while (take(r, ','));
    return take(r, ']');
}

static bool take_mode(reader *r, uint64_t *bits)
{
    sp_text word;
    *bits = 0;
    if (next(r) == 'n')
        return take_word(r, "null");
    *bits = SP_MODE_UNKNOWN;
    if (!take_string(r, &word))
        return false;
    for (size_t i = 0; i < sizeof MODES / sizeof *MODES; i++)
        if (is(word, MODES[i].word))
            *bits = MODES[i].bits;
    return true;
}

static bool on_geometry(reader *r, sp_text key, void *into)
{
    sp_offer *offer = into;
    if (is(key, "version"))
        return take_u64(r, &offer->version);
    if (is(key, "mode"))
        return take_mode(r, &offer->mode);
    if (is(key, "stripe-size"))
        return take_u64(r, &offer->stripe_bytes);
    if (is(key, "shards"))
        return take_u64(r, &offer->shards);
    if (is(key, "blocks"))
        return offer->n_blocks == 0 && take_blocks(r, offer);
    return skip(r);
}

static bool on_error(reader *r, sp_text key, void *into)
{
    sp_message *message = into;
    return is(key, "desc") ? take_string(r, &message->desc) : skip(r);
}

static bool on_attached(reader *r, sp_text key, void *into)
{
    sp_message *message = into;
    uint64_t number;
    if (!is(key, "guest") || next(r) == '-')
        return skip(r);
    if (!take_u64(r, &number) || number > INT64_MAX)
        return false;
    message->guest = (int64_t)number;
    return true;
}

static bool take_event(reader *r, sp_message *message)
{
    sp_text word;
    if (!take_string(r, &word))
        return false;
    if (is(word, "READY"))
        message->kind = SP_SAYS_READY;
    else if (is(word, "COMPLETED"))
        message->kind = SP_SAYS_COMPLETED;
    else if (is(word, "FAILED"))
        message->kind = SP_SAYS_FAILED;
    return true;
}

static bool on_message(reader *r, sp_text key, void *into)
{
    sp_message *message = into;
    if (is(key, "event"))
        return take_event(r, message);
    if (is(key, "desc"))
        return take_string(r, &message->desc);
    if (is(key, "huge-pages")) {
        message->huge = next(r) == 't';
    } else if (is(key, "attached")) {
        message->kind = SP_SAYS_ATTACHED;
        return take_members(r, on_attached, message);
    } else if (is(key, "error")) {
        message->kind = SP_SAYS_ERROR;
        return take_members(r, on_error, message);
    } else if (is(key, "geometry")) {
        message->kind = SP_SAYS_GEOMETRY;
        return take_members(r, on_geometry, &message->offer);
    }
    return skip(r);
}

int sp_message_parse(const char *buf, size_t len, sp_message *message)
{
    reader r = {buf, buf + len};
    message->kind = SP_SAYS_OTHER;
    message->desc = (sp_text){"", 0};
    message->huge = 0;
    message->guest = -1;
    message->offer = (sp_offer){.mode = SP_MODE_UNKNOWN};
    return take_members(&r, on_message, message) && next(&r) == '\0' && r.at == r.end ? 0 : -1;
}

/* The value of a \u escape, -1 if there is none. */
static long take_unit(const char *at, size_t len)
{
    long value = 0;
    if (len < 6 || at[0] != '\\' || at[1] != 'u')
        return -1;
    for (int i = 2; i < 6; i++) {
        if (!is_hex(at[i]))
            return -1;
        value = value * 16 + (is_digit(at[i]) ? at[i] - '0' : (at[i] | 0x20) - 'a' + 10);
    }
    return value;
}

/* The character of a \u escape, or of two that are a surrogate pair; 0: none, or one that a terminal
 * must not get. */
static uint32_t take_character(const char *at, size_t len, size_t *used)
{
    long first = take_unit(at, len);
    *used = 6;
    if (first >= 0xd800 && first < 0xe000) {
        long second = take_unit(at + 6, len - 6);
        *used = 12;
        if (first >= 0xdc00 || second < 0xdc00 || second >= 0xe000)
            return 0;
        return 0x10000 + (uint32_t)((first - 0xd800) << 10 | (second - 0xdc00));
    }
    return first < 0x20 || (first >= 0x7f && first < 0xa0) ? 0 : (uint32_t)first;
}

static size_t put_utf8(char *out, uint32_t c)
{
    static const uint8_t FIRST[] = {0, 0xc0, 0xe0, 0xf0};
    size_t more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    out[0] = (char)(FIRST[more] | c >> (6 * more));
    for (size_t i = 1; i <= more; i++)
        out[i] = (char)(0x80 | (c >> (6 * (more - i)) & 0x3f));
    return more + 1;
}

/* What the byte or escape at `at` stands for, at most four bytes in `out`: how many. */
static size_t undo(const char *at, size_t len, char *out, size_t *used)
{
    uint32_t c = take_character(at, len, used);
    if (c)
        return put_utf8(out, c);
    *used = at[0] == '\\' && len > 1 && memchr("\"\\/", at[1], 3) ? 2 : 1;
    out[0] = at[*used - 1];
    return 1;
}

void sp_text_print(char *dst, size_t room, sp_text text)
{
    size_t n = 0, used = 0, more = 0;
    for (size_t i = 0; i < text.len; i += used, n += more) {
        char out[4];
        more = undo(text.at + i, text.len - i, out, &used);
        if (n + more >= room)
            break;
        memcpy(dst + n, out, more);
    }
    dst[n] = '\0';
}
