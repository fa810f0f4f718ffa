/* The suite of multifd alone, for the thread sanitizer. */
#include "suites.h"

int main(void)
{
    multifd_suite();
    return 0;
}
