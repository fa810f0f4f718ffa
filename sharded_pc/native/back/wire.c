#include "back/wire.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

static sp_status broken(sp_return_path *rp, int err)
{
    rp->err = err;
    return SP_SYS;
}

/* Waits for room on the wire; a stopped receiver gives a stuck peer one more chance. */
static sp_status await_room(sp_return_path *rp)
{
    struct pollfd p = {.fd = rp->fd, .events = POLLOUT};
    int n = poll(&p, 1, SP_WIRE_STUCK_MS);
    if (n < 0 && errno != EINTR)
        return broken(rp, errno);
    return n == 0 && atomic_load(&rp->stop) ? SP_STOPPED : SP_OK;
}

static sp_status write_out(sp_return_path *rp)
{
    for (size_t done = 0; done < rp->n_out;) {
        ssize_t n = write(rp->fd, rp->out + done, rp->n_out - done);
        sp_status st = SP_OK;
        if (n >= 0)
            done += (size_t)n;
        else if (errno == EAGAIN)
            st = await_room(rp);
        else if (errno != EINTR)
            st = broken(rp, errno);
        if (st != SP_OK)
            return st;
    }
    atomic_fetch_add(&rp->sent, rp->n_out);
    return SP_OK;
}

sp_status sp_rp_flush(sp_return_path *rp)
{
    sp_status st = write_out(rp);
    rp->n_out = 0;
    return st;
}
