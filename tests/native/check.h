/* The least that a C test needs: CHECK says where and what, and ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                  \
    do {                                                                             \
        if (!(what)) {                                                               \
            fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #what); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

#define CHECK_EQ(is, should)                                                                \
    do {                                                                                    \
        int64_t is_ = (int64_t)(is), should_ = (int64_t)(should);                           \
        if (is_ != should_) {                                                               \
            fprintf(stderr, "%s:%d: %s is %" PRId64 ", not %" PRId64 "\n", __FILE__,        \
                    __LINE__, #is, is_, should_);                                           \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

/* xorshift64: the same numbers in every run. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline uint64_t random_below(uint64_t *state, uint64_t n)
{
    return next_random(state) % n;
}

#endif
