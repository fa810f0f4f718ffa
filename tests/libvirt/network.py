"""A network namespace with nothing but a loopback device, so that ports are nobody else's.

Its first process lives as long as its standard input is open: it ends with the test run, however
that ends.
"""

from __future__ import annotations

import subprocess

from tests.qemu import wait_until

UP = "ip link set lo up && echo ready && exec cat"


class Network:
    """The namespace; use as a context manager."""

    def __init__(self) -> None:
        command = ["unshare", "--net", "sh", "-c", UP]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        wait_until(lambda: self._process.poll() is not None, "the network's end")
        self._process.stdout.close()

    @property
    def path(self) -> str:
        """For ``nsenter --net=``."""
        return f"/proc/{self._process.pid}/ns/net"
