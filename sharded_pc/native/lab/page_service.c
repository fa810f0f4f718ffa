#define _GNU_SOURCE
#include "lab/page_service.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shared/control.h"
#include "stream/ram.h"
#include "records.h"

enum { STUCK_MS = 30000 };
enum { MSG_REQ_PAGES_ID = 3, MSG_REQ_PAGES = 4, LAST_MSG = 7 };
enum { HEAD = 4, WHERE = 12, LARGEST_PAYLOAD = 512 };
enum { RECORD_ROOM = SP_RECORDS_ROOM(1) };

sp_page_service *sp_page_service_new(int fd, int stop_fd, const char *block, uint64_t first,
                                     uint64_t pages)
{
    sp_page_service *s = calloc(1, sizeof *s + pages);
    if (!s)
        return NULL;
    s->fd = fd;
    s->stop_fd = stop_fd;
    s->first = first;
    s->pages = pages;
    strncpy(s->block, block, sizeof s->block - 1);
    return s;
}

void sp_page_service_free(sp_page_service *s)
{
    free(s);
}

void sp_page_pattern(uint8_t *dst, uint64_t page)
{
    uint32_t word[SP_PAGE_BYTES / 4];
    uint32_t at = (uint32_t)(page * SP_PAGE_BYTES);
    for (uint32_t i = 0; i < SP_PAGE_BYTES / 4; i++)
        word[i] = (at + 4 * i) ^ SP_PATTERN_KEY;
    memcpy(dst, word, sizeof word);
}

/* SP_OK: the wire is ready for `events`. */
static sp_status wait_for(sp_page_service *s, short events, int timeout_ms)
{
    struct pollfd fds[2] = {{.fd = s->fd, .events = events}, {.fd = s->stop_fd, .events = POLLIN}};
    int n = poll(fds, 2, timeout_ms);
    if (n < 0 && errno != EINTR) {
        s->err = errno;
        return SP_SYS;
    }
    if (n <= 0)
        return SP_AGAIN;
    return fds[1].revents ? SP_STOPPED : SP_OK;
}

static sp_status failed(sp_page_service *s)
{
    if (errno == EPIPE || errno == ECONNRESET)
        return SP_EOF;
    s->err = errno;
    return SP_SYS;
}

static sp_status write_all(sp_page_service *s, const uint8_t *src, size_t len)
{
    while (len) {
        ssize_t n = send(s->fd, src, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            /* Half a record is out: a destination that takes nothing for so long has failed. */
            sp_status status = wait_for(s, POLLOUT, STUCK_MS);
            if (status == SP_AGAIN) {
                errno = ETIMEDOUT;
                return failed(s);
            }
            if (status != SP_OK)
                return status;
        } else if (n < 0 && errno != EINTR) {
            return failed(s);
        } else if (n > 0) {
            src += n;
            len -= (size_t)n;
        }
    }
    return SP_OK;
}

static sp_status send_page(sp_page_service *s, uint64_t page)
{
    uint8_t out[RECORD_ROOM];
    uint64_t kind = SP_RAM_PAGE | (s->answered ? SP_RAM_CONTINUE : 0);
    const char *name = s->answered ? NULL : s->block;
    size_t len = sp_record_header(out, page * SP_PAGE_BYTES | kind, name);
    sp_page_pattern(out + len, page);
    s->sent[page - s->first] = 1;
    s->answered++;
    return write_all(s, out, len + SP_PAGE_BYTES);
}

static sp_status answer(sp_page_service *s, uint64_t start, uint32_t length)
{
    uint64_t page = start / SP_PAGE_BYTES, end = page + length / SP_PAGE_BYTES;
    s->requests++;
    for (; page < end; page++) {
        if (page < s->first || page - s->first >= s->pages || s->sent[page - s->first])
            continue;
        sp_status status = send_page(s, page);
        if (status != SP_OK)
            return status;
    }
    return SP_OK;
}

static uint64_t be(const uint8_t *src, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value = value << 8 | src[i];
    return value;
}

static sp_status bad(sp_page_service *s, int type)
{
    s->err = type;
    return SP_BAD_FLAGS;
}

static sp_status take(sp_page_service *s, int type, const uint8_t *payload, size_t len)
{
    if (type != MSG_REQ_PAGES_ID && type != MSG_REQ_PAGES)
        return SP_OK;
    if (type == MSG_REQ_PAGES_ID) {
        if (len <= WHERE || len != WHERE + 1u + payload[WHERE])
            return bad(s, type);
        size_t name = payload[WHERE];
        s->ours = strlen(s->block) == name && !memcmp(payload + WHERE + 1, s->block, name);
    } else if (len != WHERE) {
        return bad(s, type);
    }
    return s->ours ? answer(s, be(payload, 8), (uint32_t)be(payload + 8, 4)) : SP_OK;
}

/* All whole messages of the buffer. */
static sp_status take_all(sp_page_service *s)
{
    size_t at = 0;
    sp_status status = SP_OK;
    while (status == SP_OK && s->have - at >= HEAD) {
        int type = (int)be(s->unread + at, 2);
        size_t len = (size_t)be(s->unread + at + 2, 2);
        if (type == 0 || type > LAST_MSG || len > LARGEST_PAYLOAD)
            return bad(s, type);
        if (s->have - at < HEAD + len)
            break;
        status = take(s, type, s->unread + at + HEAD, len);
        at += HEAD + len;
    }
    memmove(s->unread, s->unread + at, s->have - at);
    s->have -= at;
    return status;
}

static sp_status read_some(sp_page_service *s)
{
    ssize_t n = recv(s->fd, s->unread + s->have, sizeof s->unread - s->have, MSG_DONTWAIT);
    if (n == 0)
        return SP_EOF;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? SP_OK : failed(s);
    s->have += (size_t)n;
    return take_all(s);
}

sp_status sp_page_service_run(sp_page_service *s, int timeout_ms)
{
    while (s->answered < s->pages) {
        sp_status status = wait_for(s, POLLIN, timeout_ms);
        if (status == SP_OK)
            status = read_some(s);
        if (status != SP_OK)
            return status;
    }
    return SP_OK;
}
