/* A doorbell between two processes: a futex word in shared memory.
 *
 * Any number of waiters and ringers.  A waiter announces itself (`waiting`), looks at its work
 * once more, and only then sleeps; a ringer makes work visible, then rings.  Both sides use
 * sequentially consistent operations, so a ring between the look and the sleep is never lost: the
 * kernel compares `rung` with the value read before the look.
 */
#ifndef SP_BELL_H
#define SP_BELL_H

#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct sp_bell {
    _Atomic uint32_t rung;     /* written by ringers */
    _Atomic uint32_t waiting;  /* how many wait; a waiter that died costs a system call per ring */
} sp_bell;

static inline void sp_bell_ring(sp_bell *bell)
{
    atomic_fetch_add(&bell->rung, 1);
    if (atomic_load(&bell->waiting))
        syscall(SYS_futex, &bell->rung, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Announces a waiter; look at the work after this, then sp_bell_wait or sp_bell_cancel. */
static inline uint32_t sp_bell_prepare(sp_bell *bell)
{
    atomic_fetch_add(&bell->waiting, 1);
    return atomic_load(&bell->rung);
}

static inline void sp_bell_cancel(sp_bell *bell)
{
    atomic_fetch_sub(&bell->waiting, 1);
}

static inline void sp_bell_wait(sp_bell *bell, uint32_t seen, int timeout_ms)
{
    struct timespec ts = {timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000L};
    syscall(SYS_futex, &bell->rung, FUTEX_WAIT, seen, &ts, NULL, 0);
    sp_bell_cancel(bell);
}

#endif
