#include "stream/sync.h"

enum { WAIT_MS = 100 };

void sp_sync_expect(sp_control *c, uint32_t number)
{
    atomic_store(&c->channels[number].state, SP_MULTIFD_RUNS);
}

/* One that has ended may have come to the SYNC before. */
static sp_status await_channel(sp_control *c, sp_multifd_channel *ch, uint64_t syncs,
                               const _Atomic uint32_t *stop)
{
    for (;;) {
        uint32_t seen = sp_bell_prepare(&c->reached);
        bool ended = atomic_load(&ch->state) == SP_MULTIFD_ENDED, stopped = atomic_load(stop);
        bool there = atomic_load(&ch->syncs) >= syncs;
        if (there || ended || stopped) {
            sp_bell_cancel(&c->reached);
            return there ? SP_OK : stopped ? SP_STOPPED : SP_CHANNEL_LOST;
        }
        sp_bell_wait(&c->reached, seen, WAIT_MS);
    }
}

sp_status sp_sync_await(sp_control *c, uint32_t n, uint64_t syncs, const _Atomic uint32_t *stop,
                        sp_sync_view *view)
{
    *view = (sp_sync_view){0};
    for (uint32_t i = 0; i < n; i++) {
        sp_multifd_channel *ch = &c->channels[i];
        view->lost = i;
        sp_status st = await_channel(c, ch, syncs, stop);
        if (st != SP_OK)
            return st;
        uint64_t next = atomic_load(&ch->next_number);
        view->packets += atomic_load(&ch->packets);
        view->numbers = next > view->numbers ? next : view->numbers;
    }
    return SP_OK;
}

void sp_sync_release(sp_control *c, uint64_t syncs)
{
    atomic_store(&c->released, syncs);
    sp_bell_ring(&c->passed);
}

int sp_sync_settle(sp_control *c, uint32_t n)
{
    sp_sync_release(c, SP_SYNC_NEVER);
    for (uint32_t i = 0; i < n; i++)
        if (atomic_load(&c->channels[i].landing))
            return (int)i;
    return -1;
}
