/* QEMU's monitor, whose client is somebody who manages it (libvirt), while a migration comes in. */
#ifndef SP_MONITOR_H
#define SP_MONITOR_H

/* Reads the environment:
 *
 *   SHARDED_PC_MONITOR        the monitor's listening socket: fd:N, inherited, or the path it is bound to
 *   SHARDED_PC_MONITOR_RELAY  path of the receiver's socket for the relay (attach/monitor/relay.h)
 *
 * Without them nothing is relayed.  NULL, or what is wrong. */
const char *sp_monitor_configure(void);
void sp_monitor_leave_environment(void);

/* From now on who connects there meets the relay.  0 or -errno. */
int sp_monitor_start(void);

/* sendmsg(2), for the one who has that name here (hold.c). */
struct msghdr;
long sp_monitor_sendmsg(int sock, const struct msghdr *msg, int flags);

#endif
