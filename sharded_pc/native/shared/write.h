/* All of some bytes into a file. */
#ifndef SP_WRITE_H
#define SP_WRITE_H

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

/* 0, or errno. */
static inline int sp_write_all(int fd, const void *bytes, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t w = write(fd, (const char *)bytes + done, n - done);
        if (w < 0 && errno != EINTR)
            return errno;
        if (w > 0)
            done += (size_t)w;
    }
    return 0;
}

#endif
