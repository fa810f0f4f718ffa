#include "lab/oracle.h"

#include <string.h>
#include <time.h>

#include "shared/control.h"
#include "stream/ram.h"
#include "records.h"

enum { WORDS = SP_PAGE_BYTES / 8 };

/* splitmix64's finaliser (Steele, Lea, Flood 2014): cheap and without visible structure. */
static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

static uint64_t start_of(uint64_t seed, uint32_t block, uint64_t page, uint8_t version)
{
    return mix(mix(seed + block) ^ (page << 8 | version));
}

static uint64_t word_of(uint64_t start, uint64_t k, uint8_t version)
{
    return version ? mix(start + k * 0x9E3779B97F4A7C15ULL) : 0;
}

void sp_oracle_fill(uint8_t *dst, uint64_t seed, uint32_t block, uint64_t page, uint8_t version)
{
    uint64_t start = start_of(seed, block, page, version);
    for (uint64_t k = 0; k < WORDS; k++) {
        uint64_t word = word_of(start, k, version);
        memcpy(dst + k * 8, &word, 8);
    }
}

int sp_oracle_check(const uint8_t *src, uint64_t seed, uint32_t block, uint64_t page,
                    uint8_t version)
{
    uint64_t start = start_of(seed, block, page, version);
    for (uint64_t k = 0; k < WORDS; k++) {
        uint64_t word;
        memcpy(&word, src + k * 8, 8);
        if (word != word_of(start, k, version))
            return (int)(k * 8);
    }
    return -1;
}

size_t sp_guest_visit(uint8_t *base, uint64_t seed, uint32_t block, const uint64_t *pages, size_t n,
                      const uint8_t *expected, const uint8_t *write, uint64_t *latency_ns)
{
    for (size_t i = 0; i < n; i++) {
        uint8_t *page = base + pages[i] * SP_PAGE_BYTES;
        uint64_t before = sp_now_ns();
        (void)*(volatile uint8_t *)page;
        if (latency_ns)
            latency_ns[i] = sp_now_ns() - before;
        if (sp_oracle_check(page, seed, block, pages[i], expected[pages[i]]) >= 0)
            return i;
        if (write && write[pages[i]] != SP_KEEP)
            sp_oracle_fill(page, seed, block, pages[i], write[pages[i]]);
    }
    return n;
}

size_t sp_oracle_records(uint8_t *dst, const char *name, int go_on, uint64_t seed, uint32_t block,
                         const uint64_t *pages, size_t n, const uint8_t *versions)
{
    uint8_t *at = dst;
    for (size_t i = 0; i < n; i++) {
        uint8_t version = versions[pages[i]];
        uint64_t named = go_on || i ? SP_RAM_CONTINUE : 0;
        uint64_t kind = version ? SP_RAM_PAGE : SP_RAM_ZERO;
        at += sp_record_header(at, pages[i] * SP_PAGE_BYTES | kind | named, named ? NULL : name);
        if (version) {
            sp_oracle_fill(at, seed, block, pages[i], version);
            at += SP_PAGE_BYTES;
        } else {
            *at++ = 0;
        }
    }
    return (size_t)(at - dst);
}
