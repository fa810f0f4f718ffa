/* The program's way to its broker (attach/broker.py): a process beside it, which finds the receiver of
 * a file and connects to it.  The program may not be able to by then: it may have gone into another
 * root, and may only make the system calls that it needs itself.
 *
 * One datagram each way: a wish's letter, device, inode; an answer's letter, an error's text, and a
 * descriptor if it is a receiver's file: a connection to that, or the file itself, as wished.
 */
#ifndef SP_BROKER_H
#define SP_BROKER_H

#include <sys/types.h>

#include "../guest/channel.h"

typedef enum sp_answer {
    SP_ANSWER_NONE = 'n',     /* no receiver's */
    SP_ANSWER_RECEIVER = 'r', /* pages may be missing */
    SP_ANSWER_PLAIN = 'p',    /* everything is here; the file, whatever was wished */
    SP_ANSWER_ERROR = 'e',
} sp_answer;

typedef enum sp_wish {
    SP_WISH_RECEIVER = 'R', /* a connection, on which the attach protocol's first line was said */
    SP_WISH_FILE = 'F',
} sp_wish;

typedef struct sp_broker {
    int sock; /* -1: none */
} sp_broker;

/* Connects to the abstract Unix socket of this name.  0 or -errno. */
int sp_broker_open(sp_broker *broker, const char *name);

/* In a child just forked: a connection of its own, over its parent's. */
void sp_broker_fork(sp_broker *broker);

/* Whose is this file?  With `fd` a descriptor that becomes the caller's, close-on-exec, or -1; waits as
 * long as the broker does for a receiver to listen.  -1 and the reason, and SP_ANSWER_ERROR. */
sp_answer sp_broker_ask(sp_broker *broker, sp_wish wish, dev_t dev, ino_t ino, int *fd,
                        sp_trouble *trouble);

#endif
