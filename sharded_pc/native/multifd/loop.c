#include "multifd/loop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "multifd/land.h"
#include "multifd/unpack.h"
#include "shared/write.h"

enum { WAIT_MS = 100, CHUNK_PAGES = 32 }; /* a chunk stays in the cache until it is written */

struct sp_multifd {
    sp_multifd_channel *channel;
    sp_control *control;
    int fd, record_fd; /* the latter -1: what comes is not written down */
    _Atomic uint32_t stop;
    sp_land land;
    sp_unpack *unpack;
    uint32_t method; /* of the packets so far, 0: none was compressed */
    int err;
    sp_packet packet;
    sp_packet_fault fault;
    uint8_t raw[SP_PACKET_BYTES];
    uint8_t pages[SP_PACKET_MOST_PAGES * SP_PAGE_BYTES];
    uint8_t packed[SP_PACKED_MOST_BYTES];
};

sp_multifd *sp_multifd_new(sp_control *c, uint32_t number, int fd, sp_word *received,
                           sp_word *written)
{
    sp_multifd *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->control = c;
    m->channel = &c->channels[number];
    m->fd = fd;
    m->record_fd = -1;
    m->land.control = c;
    m->land.received = received;
    m->land.written = written;
    return m;
}

void sp_multifd_free(sp_multifd *m)
{
    if (m)
        sp_unpack_free(m->unpack);
    free(m);
}

void sp_multifd_use_block(sp_multifd *m, uint32_t block, int fd)
{
    m->land.block_fd[block] = fd;
}

void sp_multifd_record(sp_multifd *m, int fd)
{
    m->record_fd = fd;
}

/* SP_EOF at the end of the channel, SP_CHANNEL_CUT if some of the n bytes had come. */
static sp_status take(sp_multifd *m, uint8_t *to, size_t n)
{
    for (size_t got = 0; got < n;) {
        ssize_t r = recv(m->fd, to + got, n - got, MSG_WAITALL);
        if (r < 0 && errno == EINTR)
            continue;
        if (r == 0 || (r < 0 && errno == ECONNRESET))
            return got ? SP_CHANNEL_CUT : SP_EOF;
        if (r < 0) {
            m->err = errno;
            return SP_SYS;
        }
        if (m->record_fd >= 0 && (m->err = sp_write_all(m->record_fd, to + got, (size_t)r)))
            return SP_SYS;
        got += (size_t)r;
        sp_count(&m->control->totals.multifd, (uint64_t)r);
    }
    return SP_OK;
}

/* The same, where the middle of a packet is. */
static sp_status take_more(sp_multifd *m, uint8_t *to, size_t n)
{
    sp_status st = take(m, to, n);
    return st == SP_EOF ? SP_CHANNEL_CUT : st;
}

static sp_status landed(sp_multifd *m, sp_status st)
{
    m->err = st == SP_SYS ? m->land.err : m->err;
    return st;
}

static sp_status plain_pages(sp_multifd *m)
{
    const sp_packet *p = &m->packet;
    for (uint32_t i = 0, n; i < p->normal; i += n) {
        n = p->normal - i < CHUNK_PAGES ? p->normal - i : CHUNK_PAGES;
        sp_status st = take_more(m, m->pages, (size_t)n * SP_PAGE_BYTES);
        if (st == SP_OK)
            st = landed(m, sp_land_pages(&m->land, p, i, n, m->pages));
        if (st != SP_OK)
            return st;
    }
    return SP_OK;
}

static sp_status choose_method(sp_multifd *m, uint32_t method)
{
    if (m->method == method)
        return SP_OK;
    m->fault.value = m->packet.flags;
    if (m->method || !sp_unpack_knows(method))
        return SP_PACKET_KIND;
    m->method = method;
    m->unpack = sp_unpack_new(method);
    m->err = ENOMEM;
    return m->unpack ? SP_OK : SP_SYS;
}

static sp_status packed_pages(sp_multifd *m, uint32_t method)
{
    const sp_packet *p = &m->packet;
    size_t bytes = (size_t)p->normal * SP_PAGE_BYTES;
    sp_status st = choose_method(m, method);
    if (st == SP_OK)
        st = take_more(m, m->packed, p->bytes);
    if (st != SP_OK)
        return st;
    m->fault.value = p->bytes;
    m->fault.limit = bytes;
    if (sp_unpack_some(m->unpack, m->packed, p->bytes, m->pages, bytes))
        return SP_PACKET_PACKED;
    return landed(m, sp_land_pages(&m->land, p, 0, p->normal, m->pages));
}

static sp_status write_pages(sp_multifd *m)
{
    uint32_t method = m->packet.flags & SP_PACKET_METHOD;
    sp_status st = landed(m, sp_land_zeros(&m->land, &m->packet));
    if (st != SP_OK || m->packet.normal == 0)
        return st;
    return method ? packed_pages(m, method) : plain_pages(m);
}

/* `landing`, then a look at `released`; the stream does it the other way round before anybody may
 * look at the pages. */
static sp_status pages(sp_multifd *m)
{
    atomic_store(&m->channel->landing, 1);
    sp_status st = SP_PACKET_LATE;
    if (atomic_load(&m->control->released) != SP_SYNC_NEVER)
        st = write_pages(m);
    atomic_store(&m->channel->landing, 0);
    return st;
}

/* Numbers are the source's over all channels: that none is missing shows in their sum. */
static void count(sp_multifd_channel *ch, const sp_packet *p)
{
    uint64_t kinds = (p->normal + p->zero ? 1u : 0u) + (p->flags & SP_PACKET_SYNC);
    sp_count(&ch->packets, kinds);
    if (kinds && p->number >= atomic_load(&ch->next_number))
        atomic_store(&ch->next_number, p->number + 1);
}

static void wait_at_sync(sp_multifd *m)
{
    sp_control *c = m->control;
    uint64_t mine = atomic_fetch_add(&m->channel->syncs, 1) + 1;
    sp_bell_ring(&c->reached);
    while (atomic_load(&c->released) < mine && !atomic_load(&m->stop)) {
        uint32_t seen = sp_bell_prepare(&c->passed);
        if (atomic_load(&c->released) >= mine) {
            sp_bell_cancel(&c->passed);
            break;
        }
        sp_bell_wait(&c->passed, seen, WAIT_MS);
    }
}

static sp_status step(sp_multifd *m)
{
    sp_status st = take(m, m->raw, sizeof m->raw);
    if (st == SP_OK)
        st = sp_packet_parse(m->control, m->raw, &m->packet, &m->fault);
    if (st == SP_OK && m->packet.normal + m->packet.zero)
        st = pages(m);
    if (st != SP_OK)
        return st;
    count(m->channel, &m->packet);
    if (m->packet.flags & SP_PACKET_SYNC)
        wait_at_sync(m);
    return SP_OK;
}

void sp_multifd_run(sp_multifd *m)
{
    sp_multifd_channel *ch = m->channel;
    sp_status st;
    do
        st = step(m);
    while (st == SP_OK);
    ch->status = (uint32_t)st;
    ch->err = st == SP_SYS ? m->err : 0;
    ch->value = m->fault.value;
    ch->limit = m->fault.limit;
    memcpy(ch->name, m->fault.name, sizeof ch->name);
    atomic_store(&ch->state, SP_MULTIFD_ENDED);
    sp_bell_ring(&m->control->reached);
    shutdown(m->fd, SHUT_RDWR); /* the source would write into it for ever */
}

void sp_multifd_stop(sp_multifd *m)
{
    atomic_store(&m->stop, 1);
    shutdown(m->fd, SHUT_RDWR); /* a read that waits ends; it may be closed already */
}
