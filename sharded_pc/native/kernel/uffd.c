#define _GNU_SOURCE
#include "kernel/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel/uffd_abi.h"

static int open_device(void)
{
    int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev < 0)
        return -errno;
    int fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC);
    int err = errno;
    close(dev);
    return fd < 0 ? -err : fd;
}

static int open_syscall(int flags)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | flags);
    return fd < 0 ? -errno : (int)fd;
}

static int open_any(int user_only_ok, sp_uffd_info *info)
{
    int fd = open_device();
    if (fd >= 0) {
        info->how = SP_UFFD_DEVICE;
        return fd;
    }
    info->device_errno = -fd;
    fd = open_syscall(0);
    if (fd >= 0) {
        info->how = SP_UFFD_SYSCALL;
        return fd;
    }
    info->syscall_errno = -fd;
    if (!user_only_ok)
        return fd;
    fd = open_syscall(UFFD_USER_MODE_ONLY);
    if (fd >= 0)
        info->how = SP_UFFD_USER_ONLY;
    return fd;
}

/* The handshake happens once per descriptor, and answers the offered features only if none or
 * supported ones are asked: so a first, throw-away descriptor reads the offer. */
static int read_offer(int user_only_ok, sp_uffd_info *info)
{
    int fd = open_any(user_only_ok, info);
    if (fd < 0)
        return fd;
    struct uffdio_api api = {.api = UFFD_API};
    int rc = ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
    info->features = api.features;
    info->ioctls = api.ioctls;
    close(fd);
    return rc;
}

int sp_uffd_open(uint64_t features, int user_only_ok, sp_uffd_info *info)
{
    memset(info, 0, sizeof *info);
    int rc = read_offer(user_only_ok, info);
    if (rc < 0)
        return rc;
    if (features & ~info->features)
        return -EOPNOTSUPP;
    int fd = open_any(user_only_ok, info);
    if (fd < 0)
        return fd;
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(fd, UFFDIO_API, &api)) {
        rc = -errno;
        close(fd);
        return rc;
    }
    return fd;
}

int sp_uffd_register(int uffd, uint64_t addr, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
    struct uffdio_register reg = {.range = {addr, len}, .mode = mode};
    if (ioctl(uffd, UFFDIO_REGISTER, &reg))
        return -errno;
    if (ioctls)
        *ioctls = reg.ioctls;
    return 0;
}

int sp_uffd_unregister(int uffd, uint64_t addr, uint64_t len)
{
    struct uffdio_range range = {addr, len};
    return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

int sp_uffd_wake(int uffd, uint64_t addr, uint64_t len)
{
    struct uffdio_range range = {addr, len};
    return ioctl(uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}

/* What the kernel says of a fill: `done` is the struct's answer field, negative errno or bytes.
 * A range that meets a present page ends with EAGAIN and the bytes before it; a call that STARTS
 * on one ends with EEXIST; EAGAIN without progress means that the address space is changing. */
static sp_fill outcome(int rc, int err, int64_t done, sp_fill_result *res)
{
    res->done = done > 0 ? (uint64_t)done : 0;
    res->err = 0;
    if (rc == 0)
        return SP_FILL_DONE;
    if (res->done > 0 || err == EAGAIN)
        return SP_FILL_PART;
    if (err == EEXIST)
        return SP_FILL_PRESENT;
    res->err = err;
    return SP_FILL_FAILED;
}

sp_fill sp_uffd_copy(int uffd, uint64_t dst, uint64_t src, uint64_t len, int wake,
                     sp_fill_result *res)
{
    struct uffdio_copy c = {.dst = dst, .src = src, .len = len};
    if (!wake)
        c.mode = UFFDIO_COPY_MODE_DONTWAKE;
    int rc = ioctl(uffd, UFFDIO_COPY, &c);
    return outcome(rc, errno, rc ? c.copy : (int64_t)len, res);
}

sp_fill sp_uffd_zeropage(int uffd, uint64_t addr, uint64_t len, int wake, sp_fill_result *res)
{
    struct uffdio_zeropage z = {.range = {addr, len}};
    if (!wake)
        z.mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE;
    int rc = ioctl(uffd, UFFDIO_ZEROPAGE, &z);
    return outcome(rc, errno, rc ? z.zeropage : (int64_t)len, res);
}

sp_fill sp_uffd_continue(int uffd, uint64_t addr, uint64_t len, sp_fill_result *res)
{
    struct uffdio_continue c = {{addr, len}, 0, 0};
    int rc = ioctl(uffd, UFFDIO_CONTINUE, &c);
    return outcome(rc, errno, rc ? c.mapped : (int64_t)len, res);
}
