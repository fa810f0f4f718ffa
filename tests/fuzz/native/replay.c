/* Stands in for libFuzzer where only gcc is: PROGRAM [-runs=N] [-seed=N] [-artifact_prefix=P] DIR...
 *
 * Runs every file of the folders, then N changed ones, the same for the same seed.  An input that ends
 * the program is left behind as P + "failed".
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fuzz.h"

enum { MOST_BYTES = 16384, MOST_INPUTS = 4096, MOST_CHANGES = 6 };

typedef struct input {
    uint8_t *bytes;
    size_t size;
} input;

static input corpus[MOST_INPUTS], running;
static size_t n_inputs;
static char artifact[4096];

void __sanitizer_set_death_callback(void (*callback)(void));

static void leave_behind(void)
{
    FILE *file = running.bytes ? fopen(artifact, "wb") : NULL;
    if (!file)
        return;
    fwrite(running.bytes, 1, running.size, file);
    fclose(file);
    fprintf(stderr, "the input is in %s\n", artifact);
    running.bytes = NULL;
}

static void run(const uint8_t *bytes, size_t size)
{
    running.bytes = malloc(size ? size : 1); /* no byte more, so that the sanitizer sees one too far */
    running.size = size;
    memcpy(running.bytes, bytes, size);
    LLVMFuzzerTestOneInput(running.bytes, size);
    free(running.bytes);
    running.bytes = NULL;
}

static int is_file(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

static void read_file(const char *folder, const char *name)
{
    static uint8_t bytes[MOST_BYTES];
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    CHECK(file && n_inputs < MOST_INPUTS);
    input *in = &corpus[n_inputs++];
    in->size = fread(bytes, 1, sizeof bytes, file);
    in->bytes = malloc(in->size ? in->size : 1);
    memcpy(in->bytes, bytes, in->size);
    fclose(file);
}

static void read_folder(const char *folder)
{
    struct dirent **names;
    int n = scandir(folder, &names, is_file, alphasort);
    CHECK(n > 0);
    for (int i = 0; i < n; i++) {
        read_file(folder, names[i]->d_name);
        free(names[i]);
    }
    free(names);
}

static size_t delete(uint8_t *bytes, size_t size, size_t at, uint64_t *random)
{
    size_t n = 1 + random_below(random, 16);
    n = n < size - at ? n : size - at;
    memmove(bytes + at, bytes + at + n, size - at - n);
    return size - n;
}

static size_t insert(uint8_t *bytes, size_t size, size_t at, const uint8_t *from, size_t n)
{
    n = n < MOST_BYTES - size ? n : MOST_BYTES - size;
    memmove(bytes + at + n, bytes + at, size - at);
    memcpy(bytes + at, from, n);
    return size + n;
}

static size_t splice(uint8_t *bytes, size_t size, size_t at, uint64_t *random)
{
    const input *other = &corpus[random_below(random, n_inputs)];
    size_t from = random_below(random, other->size + 1), n = other->size - from;
    n = random_below(random, 2) && n > 16 ? 16 : n;
    return insert(bytes, size, at, other->bytes + from, n);
}

static size_t change(uint8_t *bytes, size_t size, uint64_t *random)
{
    size_t at = random_below(random, size + 1);
    uint64_t noise = next_random(random), ones = 0;
    switch (random_below(random, 7)) {
    case 0:
        return insert(bytes, size, at, (uint8_t *)&noise, 1 + noise % 8);
    case 1:
        return insert(bytes, size, at, (uint8_t *)&ones, 1 + noise % 8);
    case 2:
        return splice(bytes, size, at, random);
    case 3:
        return delete(bytes, size, at, random);
    case 4:
        return at;
    case 5:
        if (at < size)
            bytes[at] = (uint8_t)noise;
        return size;
    default:
        if (at < size)
            bytes[at] ^= (uint8_t)(1u << noise % 8);
        return size;
    }
}

static void run_changed(uint64_t runs, uint64_t seed)
{
    static uint8_t bytes[MOST_BYTES];
    uint64_t random = seed * 0x9E3779B97F4A7C15ULL | 1;
    for (uint64_t i = 0; i < runs; i++) {
        const input *in = &corpus[random_below(&random, n_inputs)];
        size_t size = in->size;
        memcpy(bytes, in->bytes, size);
        for (uint64_t n = 1 + random_below(&random, MOST_CHANGES); n; n--)
            size = change(bytes, size, &random);
        run(bytes, size);
    }
}

int main(int argc, char **argv)
{
    unsigned long long runs = 0, seed = 1;
    strcpy(artifact, "failed");
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "-artifact_prefix=", 17) == 0)
            snprintf(artifact, sizeof artifact, "%sfailed", argv[i] + 17);
        else if (sscanf(argv[i], "-runs=%llu", &runs) != 1 && sscanf(argv[i], "-seed=%llu", &seed) != 1)
            read_folder(argv[i]);
    }
    CHECK(n_inputs > 0);
    __sanitizer_set_death_callback(leave_behind);
    atexit(leave_behind);
    for (size_t i = 0; i < n_inputs; i++)
        run(corpus[i].bytes, corpus[i].size);
    run_changed(runs, seed);
    for (size_t i = 0; i < n_inputs; i++)
        free(corpus[i].bytes);
    printf("%zu inputs and %llu changed ones\n", n_inputs, runs);
    return 0;
}
