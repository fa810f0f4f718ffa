/* Outcomes of the C core.
 *
 * Every function of the core returns one of these, or 0 / -errno where only the kernel can object.
 * Partial success is a value, not an accident: the caller decides what it means (style: C holds
 * mechanism, Python holds policy).  The numbers are part of the Python binding; only append.
 */
#ifndef SP_STATUS_H
#define SP_STATUS_H

typedef enum sp_status {
    SP_OK = 0,
    SP_AGAIN = 1,         /* no more bytes within the timeout; call again with the same arguments */
    SP_STOPPED = 2,       /* somebody asked this loop to stop */
    SP_EOF = 3,           /* the peer closed the wire */
    SP_SYS = 4,           /* a system call failed; its errno is in the object's `err` */
    SP_SHARD_FAILED = 5,  /* the worker at the other end of a ring reported a failure */

    /* RAM section records (wire/ram.py is the reference) */
    SP_EOS = 16,          /* RAM_SAVE_FLAG_EOS: the section's records are over */
    SP_MEM_SIZE = 17,     /* RAM_SAVE_FLAG_MEM_SIZE: the block list follows, Python reads it */
    SP_BAD_FLAGS = 18,
    SP_UNSUPPORTED = 19,  /* a record kind this receiver does not take */
    SP_NO_BLOCK = 20,     /* CONTINUE before any block was named */
    SP_EMPTY_NAME = 21,
    SP_UNKNOWN_BLOCK = 22,
    SP_OUTSIDE_BLOCK = 23,
    SP_BAD_FILL = 24,     /* zero page with a fill byte other than 0 */
    SP_NOT_IN_POSTCOPY = 25, /* a record kind of precopy alone */
    SP_BAD_ENCODING = 26, /* xbzrle page in an encoding other than 1 */
    SP_BAD_LENGTH = 27,   /* encoded page of more bytes than it can have */
    SP_BAD_ENCODED = 28,  /* encoded page that does not decode to a page */
    SP_COMPRESSED = 29,   /* zlib data, Python inflates it: sp_ram_inflated() */
    SP_FLUSH = 30,        /* RAM_SAVE_FLAG_MULTIFD_FLUSH: the channels of multifd synchronise here */

    /* Packets of multifd (wire/multifd.py is the reference) */
    SP_PACKET_MAGIC = 32,
    SP_PACKET_VERSION = 33,
    SP_PACKET_KIND = 34,   /* flags of a kind of packet that this receiver does not take */
    SP_PACKET_PAGES = 35,  /* more pages than fit into a packet */
    SP_PACKET_SIZE = 36,   /* a payload that cannot have this size */
    SP_PACKET_BLOCK = 37,
    SP_PACKET_OFFSET = 38,
    SP_PACKET_PACKED = 39, /* a compressed payload that does not unpack */
    SP_PACKET_LATE = 40,   /* pages after the switch */
    SP_CHANNEL_CUT = 41,   /* the channel ended inside a packet */
    SP_CHANNEL_LOST = 42   /* a channel ended that a SYNC was awaited of */
} sp_status;

#endif
