/* A source's half of demand paging: answers page requests with pages, and does nothing else.
 *
 * For benchmarks.  It reads the return path and writes one PAGE record for each page that is asked
 * for, at once, each page once; every other message is passed over.  The caller has opened a `ram`
 * section before and closes it afterwards.  The pages' content is a pattern: the 32-bit word at
 * offset a of the block is (uint32_t)a ^ SP_PATTERN_KEY.
 */
#ifndef SP_PAGE_SERVICE_H
#define SP_PAGE_SERVICE_H

#include <stddef.h>
#include <stdint.h>

#include "shared/status.h"

#define SP_PATTERN_KEY 0x5A17C0DEu

enum { SP_SERVICE_BUFFER = 4096 };

typedef struct sp_page_service {
    int fd;      /* the wire, both ways; must not block */
    int stop_fd; /* readable when the service shall end; -1: none */
    int err;     /* errno after SP_SYS; the message's type after SP_BAD_FLAGS */
    uint64_t first, pages;      /* of the block: what is served */
    uint64_t requests, answered; /* messages that asked; pages that were sent */
    int ours;    /* the block named last is ours */
    char block[256];
    size_t have; /* bytes of `unread` */
    uint8_t unread[SP_SERVICE_BUFFER];
    uint8_t sent[]; /* one for each page */
} sp_page_service;

/* NULL without memory.  `block` has at most 255 bytes. */
sp_page_service *sp_page_service_new(int fd, int stop_fd, const char *block, uint64_t first,
                                     uint64_t pages);
void sp_page_service_free(sp_page_service *s);
/* SP_OK: every page was sent.  SP_AGAIN: the wire was quiet for timeout_ms, or a signal came; call
 * again.  SP_STOPPED, SP_EOF, SP_SYS; SP_BAD_FLAGS: not a message of the return path. */
sp_status sp_page_service_run(sp_page_service *s, int timeout_ms);
/* The 4096 bytes of a page of the block. */
void sp_page_pattern(uint8_t *dst, uint64_t page);

#endif
