/* The only process of a Linux guest (linux_guest.py): writes SIZE bytes in a loop, and looks at each
 * page before it does.
 *
 * Prints "filled", then "pass N MS" for each pass, by its own clock, and "wrong PAGE" for a page that
 * does not hold what the pass before left there. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_WORDS = 4096 / 8, LAST = PAGE_WORDS - 1 };

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* 1 in every page that is not as it was left. */
static uint64_t pass(volatile uint64_t *ram, uint64_t pages, uint64_t number)
{
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < pages; i++) {
        volatile uint64_t *page = ram + i * PAGE_WORDS;
        if (number && (page[0] != (i ^ (number - 1)) || page[LAST] != (i ^ (number - 1)))) {
            printf("wrong %llu\n", (unsigned long long)i);
            wrong++;
        }
        page[0] = page[LAST] = i ^ number;
    }
    return wrong;
}

int main(void)
{
    uint64_t bytes = (uint64_t)SIZE_MIB << 20;
    void *ram = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    setvbuf(stdout, NULL, _IONBF, 0);
    if (ram == MAP_FAILED) {
        puts("no memory");
        for (;;)
            pause();
    }
    for (uint64_t number = 0;; number++) {
        double begin = now_ms();
        pass(ram, bytes / 4096, number);
        if (number == 0)
            puts("filled");
        else
            printf("pass %llu %.1f\n", (unsigned long long)number, now_ms() - begin);
    }
}
