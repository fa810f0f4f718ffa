#define _GNU_SOURCE
#include "kernel/map.h"

#include <errno.h>
#include <sched.h>
#include <unistd.h>

#include "shared/control.h"
#include "kernel/uffd.h"

/* EAGAIN without progress: the guest's address space is changing (fork, mremap), for a moment. */
enum { PATIENCE = 1000 };

static uint64_t address(const sp_window *at, uint64_t page)
{
    return at->base + page * SP_PAGE_BYTES;
}

/* The next page from `page` on that has memory, or `end`. */
static uint64_t next_data(const sp_window *at, uint64_t page, uint64_t end)
{
    off_t found = lseek(at->fd, (off_t)(page * SP_PAGE_BYTES), SEEK_DATA);
    uint64_t next = found < 0 ? end : (uint64_t)found / SP_PAGE_BYTES;
    return next <= page ? page + 1 : next < end ? next : end;
}

uint64_t sp_map_pages(const sp_window *at, uint64_t page, uint64_t pages)
{
    uint64_t end = page + pages, mapped = 0;
    for (int patience = PATIENCE; page < end && patience;) {
        sp_fill_result res;
        sp_fill fill = sp_uffd_continue(at->uffd, address(at, page), (end - page) * SP_PAGE_BYTES,
                                        &res);
        if (fill == SP_FILL_FAILED && res.err != EFAULT)
            break;
        page += res.done / SP_PAGE_BYTES;
        mapped += res.done / SP_PAGE_BYTES;
        if (fill == SP_FILL_PRESENT)
            page++;
        else if (fill == SP_FILL_FAILED)
            page = next_data(at, page, end);
        else if (res.done == 0) {
            patience--;
            sched_yield();
        }
    }
    return mapped;
}

static bool is_gone(int err)
{
    return err == ENOENT || err == ESRCH;
}

static bool has_data(const sp_window *at, uint64_t page)
{
    off_t from = (off_t)(page * SP_PAGE_BYTES);
    return lseek(at->fd, from, SEEK_DATA) == from;
}

bool sp_map_waited(const sp_window *at, uint64_t page, uint64_t pages, int *err)
{
    uint64_t addr = address(at, page);
    for (int patience = PATIENCE; patience; patience--) {
        sp_fill_result res;
        sp_fill fill = sp_uffd_continue(at->uffd, addr, pages * SP_PAGE_BYTES, &res);
        if (fill == SP_FILL_DONE || res.done > 0)
            return true;
        if (fill == SP_FILL_PRESENT)
            return sp_uffd_wake(at->uffd, addr, SP_PAGE_BYTES), true;
        if (fill == SP_FILL_FAILED && res.err == EFAULT)
            fill = sp_uffd_zeropage(at->uffd, addr, SP_PAGE_BYTES, 1, &res);
        if (fill == SP_FILL_DONE || (fill == SP_FILL_FAILED && is_gone(res.err)))
            return true; /* gone: unmapped or dying, nobody waits there */
        *err = fill == SP_FILL_FAILED ? res.err : 0;
        /* Memory may be full because another guest just filled the hole: then it is none any more. */
        if (*err && !has_data(at, page))
            return false;
        sched_yield(); /* the address space is changing, or another guest just filled the hole */
    }
    sp_uffd_wake(at->uffd, addr, SP_PAGE_BYTES); /* the waiter asks again */
    return *err == 0;
}
