/* One userfaultfd: open, register, fill, wake.  Thin over the kernel, errors as values. */
#ifndef SP_UFFD_H
#define SP_UFFD_H

#include <stdint.h>

enum { SP_UFFD_DEVICE = 1, SP_UFFD_SYSCALL = 2, SP_UFFD_USER_ONLY = 3 };

typedef struct sp_uffd_info {
    uint64_t features;   /* what the kernel offers, UFFD_FEATURE_* bits */
    uint64_t ioctls;     /* what the handshake allowed */
    int how;             /* SP_UFFD_*: the way it was opened */
    int device_errno;    /* why /dev/userfaultfd was not used, or 0 */
    int syscall_errno;   /* why the plain system call was not used, or 0 */
} sp_uffd_info;

/* Outcome of a fill (COPY, ZEROPAGE, CONTINUE) that starts at a page. */
typedef enum sp_fill {
    SP_FILL_DONE = 0,    /* everything asked for was done */
    SP_FILL_PART = 1,    /* the kernel stopped early: `done` bytes are in place, go on behind them */
    SP_FILL_PRESENT = 2, /* the first page is already there; nothing was done */
    SP_FILL_FAILED = 3   /* `err` says why */
} sp_fill;

typedef struct sp_fill_result {
    uint64_t done;  /* bytes */
    int err;        /* errno of SP_FILL_FAILED */
} sp_fill_result;

/* Opens a userfaultfd and does the API handshake, asking for exactly `features`.  Prefers the
 * device, then the system call, then (if user_only_ok) UFFD_USER_MODE_ONLY.
 * Returns the descriptor (close-on-exec, blocking reads) or -errno. */
int sp_uffd_open(uint64_t features, int user_only_ok, sp_uffd_info *info);

int sp_uffd_register(int uffd, uint64_t addr, uint64_t len, uint64_t mode, uint64_t *ioctls);
int sp_uffd_unregister(int uffd, uint64_t addr, uint64_t len);
int sp_uffd_wake(int uffd, uint64_t addr, uint64_t len);
/* COPY and ZEROPAGE with `wake` also wake who waits there, if the descriptor is the waiter's own. */
sp_fill sp_uffd_copy(int uffd, uint64_t dst, uint64_t src, uint64_t len, int wake,
                     sp_fill_result *res);
sp_fill sp_uffd_zeropage(int uffd, uint64_t addr, uint64_t len, int wake, sp_fill_result *res);
sp_fill sp_uffd_continue(int uffd, uint64_t addr, uint64_t len, sp_fill_result *res);

#endif
