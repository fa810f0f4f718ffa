#include "qmp.h"

#include <stdlib.h>
#include <string.h>

static const char *skip_space(const char *at, const char *end)
{
    while (at < end && memchr(" \t\r\n", *at, 4))
        at++;
    return at;
}

/* `at` is a quote; the quote that closes it, or `end`. */
static const char *string_end(const char *at, const char *end)
{
    for (at++; at < end && *at != '"'; at++)
        if (*at == '\\')
            at++;
    return at < end ? at : end;
}

/* Behind the value that begins here. */
static const char *value_end(const char *at, const char *end)
{
    int depth = 0;
    for (; at < end; at++) {
        if (*at == '"')
            at = string_end(at, end);
        else if (*at == '{' || *at == '[')
            depth++;
        else if (*at == '}' || *at == ']') {
            if (depth-- == 0)
                return at;
        } else if (*at == ',' && depth == 0)
            return at;
    }
    return end;
}

bool sp_qmp_is(sp_text value, const char *word)
{
    size_t len = strlen(word);
    return value.len == len + 2 && *value.at == '"' && memcmp(value.at + 1, word, len) == 0;
}

static sp_text cut_value(const char *at, const char *end)
{
    const char *last = value_end(at, end);
    while (last > at && memchr(" \t\r\n", last[-1], 4))
        last--;
    return (sp_text){at, (size_t)(last - at)};
}

bool sp_qmp_member(const char *json, size_t len, const char *name, sp_text *value)
{
    const char *end = json + len, *at = skip_space(json, end);
    if (at == end || *at != '{')
        return false;
    for (at = skip_space(at + 1, end); at < end && *at == '"'; at = skip_space(at + 1, end)) {
        const char *close = string_end(at, end);
        sp_text key = {at, (size_t)(close - at) + (close < end)};
        at = skip_space(close < end ? close + 1 : end, end);
        if (at == end || *at != ':')
            return false;
        at = skip_space(at + 1, end);
        if (sp_qmp_is(key, name)) {
            *value = cut_value(at, end);
            return true;
        }
        at = value_end(at, end);
        if (at == end || *at != ',')
            return false;
    }
    return false;
}

char *sp_bytes_more(sp_bytes *bytes, size_t more)
{
    if (bytes->room - bytes->len < more) {
        size_t room = 2 * bytes->room + more;
        char *at = realloc(bytes->at, room);
        if (!at)
            return NULL;
        bytes->at = at;
        bytes->room = room;
    }
    return bytes->at + bytes->len;
}

void sp_bytes_drop(sp_bytes *bytes, size_t n)
{
    bytes->len -= n;
    if (bytes->len)
        memmove(bytes->at, bytes->at + n, bytes->len);
}

void sp_bytes_free(sp_bytes *bytes)
{
    free(bytes->at);
    *bytes = (sp_bytes){0};
}

bool sp_bytes_blank(const sp_bytes *bytes)
{
    const char *end = bytes->len ? bytes->at + bytes->len : NULL;
    return !end || skip_space(bytes->at, end) == end;
}
