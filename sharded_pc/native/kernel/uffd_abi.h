/* The kernel's userfaultfd interface, as far as we use it (Linux include/uapi/linux/userfaultfd.h).
 *
 * Declared here because installed headers are older than running kernels: what the kernel can do is
 * probed at run time, never at build time.  Names and layouts are the kernel's.
 */
#ifndef SP_UFFD_ABI_H
#define SP_UFFD_ABI_H

#include <assert.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define UFFD_API 0xAAULL
#define UFFD_USER_MODE_ONLY 1

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_PAGEFAULT_FLAG_MINOR (1ULL << 2)

#define UFFD_FEATURE_MISSING_SHMEM (1ULL << 5)
#define UFFD_FEATURE_THREAD_ID (1ULL << 8)
#define UFFD_FEATURE_MINOR_SHMEM (1ULL << 10)

#define UFFDIO_REGISTER_MODE_MISSING (1ULL << 0)
#define UFFDIO_REGISTER_MODE_MINOR (1ULL << 2)
#define UFFDIO_COPY_MODE_DONTWAKE (1ULL << 0)
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE (1ULL << 0)
#define UFFDIO_CONTINUE_MODE_DONTWAKE (1ULL << 0)

/* Numbers of the ioctls, as bits of uffdio_register.ioctls */
#define UFFDIO_BIT_WAKE (1ULL << 2)
#define UFFDIO_BIT_COPY (1ULL << 3)
#define UFFDIO_BIT_ZEROPAGE (1ULL << 4)
#define UFFDIO_BIT_CONTINUE (1ULL << 7)

struct uffdio_api {
    uint64_t api, features, ioctls;
};
struct uffdio_range {
    uint64_t start, len;
};
struct uffdio_register {
    struct uffdio_range range;
    uint64_t mode, ioctls;
};
struct uffdio_copy {
    uint64_t dst, src, len, mode;
    int64_t copy;
};
struct uffdio_zeropage {
    struct uffdio_range range;
    uint64_t mode;
    int64_t zeropage;
};
struct uffdio_continue {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
struct uffd_msg {
    uint8_t event, reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    struct {
        uint64_t flags, address;
        uint32_t ptid, reserved;
    } pagefault;
};

static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
static_assert(sizeof(struct uffdio_zeropage) == 32, "uffdio_zeropage");
static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue");
static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");

#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct uffdio_range)
#define UFFDIO_WAKE _IOR(0xAA, 0x02, struct uffdio_range)
#define UFFDIO_COPY _IOWR(0xAA, 0x03, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct uffdio_zeropage)
#define UFFDIO_CONTINUE _IOWR(0xAA, 0x07, struct uffdio_continue)

#endif
