/* The first moments of a child process (processes.py), before there is Python in it: the kernel shall
 * kill it when the one that started it dies, even if it is stopped, or has not come far yet.
 *
 * Becomes the interpreter that the variable SHARDED_PC_CHILD names, "PARENT:PATH", with its own
 * arguments. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

static const char VARIABLE[] = "SHARDED_PC_CHILD";

int main(int argc, char **argv)
{
    const char *told = getenv(VARIABLE);
    char *path = NULL;
    long parent = told ? strtol(told, &path, 10) : 0;
    if (argc < 1 || !path || *path++ != ':') {
        fprintf(stderr, "sharded-pc-child: started by something else than sharded_pc\n");
        return 2;
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
        return 1; /* it has died before this */
    argv[0] = path;
    execv(path, argv);
    perror(path);
    return 1;
}
