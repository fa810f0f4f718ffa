/* A fuzz target in C: libFuzzer's entry, which replay.c calls too.
 *
 * A target plays the worker when the reader waits for one (--wrap=syscall): nothing is left to
 * threads, so that an input does the same each time.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
