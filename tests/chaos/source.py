"""The source of a migration through chaos."""

from __future__ import annotations

import contextlib
import random
import socket

from tests.chaos.plan import Plan
from tests.synthetic import WAIT_S, StepSource


class ChaosSource(StepSource):
    """StepSource that may be hung up from another thread, and repeats itself."""

    def __init__(self, sock: socket.socket, plan: Plan) -> None:
        super().__init__(sock, plan.oracle, bandwidth=plan.bandwidth)
        self._draw = random.Random(f"{plan.seed}/source")

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.back._thread.join(WAIT_S)

    def repeat(self, share: float) -> None:
        """Pages that were received once more: guests keep what they wrote."""
        for block, missing in enumerate(self._missing):
            here = [page for page, flag in enumerate(missing) if not flag]
            if count := int(len(here) * share):
                self.again(block, sorted(self._draw.sample(here, count)))
