#define _GNU_SOURCE
#include "shard/request.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "shared/message.h"

/* Nothing waits to be sent, so a message of some hundred bytes is taken whole or not at all: a TCP
 * socket cuts one only where it fills up a segment that waits (Linux net/ipv4/tcp.c
 * tcp_sendmsg_locked), a Unix socket never does and does not know the question. */
static bool fits_whole(int fd)
{
    int unsent = 0;
    return ioctl(fd, SIOCOUTQNSD, &unsent) != 0 || unsent == 0;
}

bool sp_rp_request(sp_control *c, int fd, uint32_t shard, uint32_t block, uint64_t page)
{
    uint8_t message[LARGEST_REQUEST];
    uint32_t nobody = 0;
    sp_desc d = {page, 1, 0, block, SP_DESC_REQUEST};
    size_t n = sp_put_request(c, message, &d, true);
    if (!atomic_compare_exchange_strong(&c->back_writer, &nobody, shard + 1))
        return false;
    ssize_t w = fits_whole(fd) ? send(fd, message, n, MSG_DONTWAIT | MSG_NOSIGNAL) : -1;
    if (w > 0 && w < (ssize_t)n) /* no kernel does: a cut message must not be gone on with */
        shutdown(fd, SHUT_RDWR);
    atomic_store(&c->back_writer, 0);
    if (w == (ssize_t)n)
        sp_count(&c->totals.requests_sent, 1);
    return w == (ssize_t)n;
}
