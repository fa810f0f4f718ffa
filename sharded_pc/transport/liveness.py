"""How soon a TCP peer that vanished without a word counts as lost.

The kernel's defaults are two hours for a wire that is quiet (tcp(7), tcp_keepalive_time) and a
quarter of an hour for one with unanswered bytes.  Meanwhile guests wait for pages.
"""

from __future__ import annotations

import socket

from sharded_pc.address import KeepAlive

KEEP_IDLE_SECONDS = 30
"""Quiet for so long: ask whether the peer still lives."""
KEEP_INTERVAL_SECONDS = 10
KEEP_COUNT = 3
"""So many questions without an answer: it is lost."""
USER_TIMEOUT_SECONDS = 60
"""So is one that does not acknowledge what was sent."""


def watch_peer(sock: socket.socket, wanted: KeepAlive) -> None:
    """Has the kernel find out; reading fails with ETIMEDOUT then, or with what routers said."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, wanted.on)
    if not wanted.on:
        return
    idle = wanted.idle or KEEP_IDLE_SECONDS
    interval, count = wanted.interval or KEEP_INTERVAL_SECONDS, wanted.count or KEEP_COUNT
    chosen = wanted != KeepAlive()
    lost = idle + interval * count if chosen else USER_TIMEOUT_SECONDS
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, count),
        (socket.TCP_USER_TIMEOUT, lost * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
