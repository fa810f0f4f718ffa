"""How soon a TCP peer that vanished without a word counts as lost.

The kernel's defaults are two hours for a wire that is quiet (tcp(7), tcp_keepalive_time) and a
quarter of an hour for one with unanswered bytes.  Meanwhile guests wait for pages.
"""

from __future__ import annotations

import socket

KEEP_IDLE_SECONDS = 30
"""Quiet for so long: ask whether the peer still lives."""
KEEP_INTERVAL_SECONDS = 10
KEEP_COUNT = 3
"""So many questions without an answer: it is lost."""
USER_TIMEOUT_SECONDS = 60
"""So is one that does not acknowledge what was sent."""


def watch_peer(sock: socket.socket) -> None:
    """Has the kernel find out; reading fails with ETIMEDOUT then, or with what routers said."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEP_IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, KEEP_INTERVAL_SECONDS),
        (socket.TCP_KEEPCNT, KEEP_COUNT),
        (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_SECONDS * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
