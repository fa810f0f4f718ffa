#include "views.h"

#include <stdlib.h>
#include <string.h>

int sp_views_add(sp_views *views, uintptr_t from, uintptr_t to)
{
    if (views->n == views->room) {
        size_t room = views->room ? views->room * 2 : 16;
        sp_view *more = realloc(views->all, room * sizeof *more);
        if (!more)
            return -1;
        views->all = more;
        views->room = room;
    }
    views->all[views->n++] = (sp_view){from, to};
    return 0;
}

static void drop(sp_views *views, size_t i)
{
    views->all[i] = views->all[--views->n];
}

/* Of one view, what stands outside is kept. */
static int cut(sp_views *views, size_t i, uintptr_t from, uintptr_t to)
{
    sp_view *view = &views->all[i];
    uintptr_t end = view->to;
    if (view->from >= from && view->to <= to) {
        drop(views, i);
    } else if (view->from < from) {
        view->to = from < view->to ? from : view->to;
        if (end > to)
            return sp_views_add(views, to, end);
    } else {
        view->from = to;
    }
    return 0;
}

int sp_views_remove(sp_views *views, uintptr_t from, uintptr_t to)
{
    for (size_t i = 0; i < views->n; i++)
        if (views->all[i].from == from && views->all[i].to == to)
            return drop(views, i), 0;
    for (size_t i = views->n; i-- > 0;) {
        sp_view view = views->all[i];
        if (view.from >= to || view.to <= from)
            continue;
        if (cut(views, i, from, to))
            return -1;
        if (view.from < from && view.to > to)
            return 0; /* one that holds all of it: another such is another mapping */
    }
    return 0;
}

int sp_views_meet(const sp_views *views, uintptr_t from, uintptr_t to)
{
    for (size_t i = 0; i < views->n; i++)
        if (views->all[i].from < to && views->all[i].to > from)
            return 1;
    return 0;
}

void sp_views_forget(sp_views *views)
{
    free(views->all);
    memset(views, 0, sizeof *views);
}
