#include "back/outstanding.h"

enum { MOST_PAGES = 1 << 18 /* QEMU reads an int of bytes */ };

/* The request for what is left of a run, and where to go on behind it: a page of the source's memory
 * is asked for once, however many of its pages are outstanding. */
static uint64_t ask(const sp_block *b, sp_desc *d)
{
    sp_whole_source_pages(b, &d->first_page, &d->pages);
    d->pages = d->pages < MOST_PAGES ? d->pages : MOST_PAGES;
    return d->first_page + d->pages;
}

bool sp_rp_next_outstanding(sp_return_path *rp, sp_desc *d)
{
    if (atomic_exchange(&rp->again, 0))
        rp->again_page = rp->again_block = 0;
    uint32_t n_blocks = atomic_load(&rp->control->n_blocks);
    for (; rp->again_block < n_blocks; rp->again_block++, rp->again_page = 0) {
        const sp_block *b = &rp->control->blocks[rp->again_block];
        for (uint64_t pages = sp_block_pages(b), run; rp->again_page < pages;) {
            uint64_t page = rp->again_page, bit = b->first_bit + page;
            run = sp_bits_run(rp->requested, bit, pages - page);
            if (sp_bit_test(rp->requested, bit)) {
                run = sp_bits_run(rp->received, bit, run < MOST_PAGES ? run : MOST_PAGES);
                if (!sp_bit_test(rp->received, bit))
                    *d = (sp_desc){page, run, 0, rp->again_block, SP_DESC_REQUEST};
            }
            rp->again_page = d->pages ? ask(b, d) : page + run;
            if (d->pages)
                return true;
        }
    }
    return false;
}
