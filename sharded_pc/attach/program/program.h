/* A receiver's RAM in a program that knows nothing of it: one whole mapping of each block, made and
 * handed over when the program comes to the first. */
#ifndef SP_PROGRAM_H
#define SP_PROGRAM_H

#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#define SP_PROGRAM "sharded_pc guest" /* who says what is said on stderr */

typedef enum sp_whose {
    SP_WHOSE_OTHER,    /* no receiver's, or all is here: an ordinary file */
    SP_WHOSE_RECEIVER, /* served */
    SP_WHOSE_NOBODY,   /* a receiver's RAM that cannot be served; that is said */
} sp_whose;

/* Is there a broker, and so anything to do?  Any thread, at any time. */
int sp_program_watches(void);

/* Could this descriptor be of RAM?  Fills `st`. */
int sp_program_may_be_ram(int fd, struct stat *st);

/* All below are called with this; a signal handler may not come in between. */
void sp_program_lock(void);
void sp_program_unlock(void);

/* Whose RAM is this?  If it is a receiver's and the first, hands over and waits. */
sp_whose sp_program_find(const struct stat *st);

/* Of SP_WHOSE_RECEIVER: where [offset, offset + len) stands, as one view more; NULL and errno. */
void *sp_program_view(const struct stat *st, size_t len, off_t offset);

/* Has this process a receiver's RAM?  Any thread, without the lock. */
int sp_program_has_memory(void);
/* Is any of this in there? */
int sp_program_meets(const void *addr, size_t len);
/* The program unmaps this, which is page-aligned. */
void sp_program_unmap(uintptr_t from, uintptr_t to);

/* A descriptor of the file itself, the caller's, close-on-exec if asked for; -1: none can be had, and
 * that is said. */
int sp_program_real(const struct stat *st, int cloexec);

#endif
