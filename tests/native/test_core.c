/* The C core under the sanitizers, without Python: `test_core` runs all suites, `test_core NAME`
 * one.  What needs a userfaultfd (placing, faults) is tested from Python. */
#include <signal.h>
#include <string.h>

#include "check.h"
#include "suites.h"

static const struct {
    const char *name;
    void (*run)(void);
} SUITES[] = {
    {"ring", ring_suite},       {"bitmap", bitmap_suite},   {"bell", bell_suite},
    {"control", control_suite}, {"stream", stream_suite},   {"precopy", precopy_suite},
    {"route", route_suite},     {"records", records_suite}, {"return-path", return_path_suite},
    {"straight", straight_suite}, {"encoded", encoded_suite}, {"multifd", multifd_suite},
    {"oracle", oracle_suite},
};

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN); /* as in Python */
    size_t ran = 0;
    for (size_t i = 0; i < sizeof SUITES / sizeof *SUITES; i++) {
        if (argc > 1 && strcmp(argv[1], SUITES[i].name) != 0)
            continue;
        printf("%s\n", SUITES[i].name);
        fflush(stdout);
        SUITES[i].run();
        ran++;
    }
    return ran ? 0 : 2;
}
