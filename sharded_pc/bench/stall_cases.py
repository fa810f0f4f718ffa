"""What is lost in the middle of a sample of `bench stall`, and how it is mended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sharded_pc.bench.guest import GuestProcess
from sharded_pc.bench.page_source import BLOCK, FIRST_BYTE, PageSource
from sharded_pc.bench.product import Product
from sharded_pc.errors import GuestLost, UsageError
from sharded_pc.observe.view import ReceiverView
from sharded_pc.shards.shard import DEATHS_MOST, DEATHS_SECONDS

STRIKE_SECONDS = 0.005
"""From the first touch on."""
RECOVER_SECONDS = 30.0
LOOK_SECONDS = 0.001


class Scene:
    """One migration in postcopy: a receiver of its own process, a source, a guest."""

    def __init__(self, folder: Path, name: str, placement: str, workers: int, size: int) -> None:
        self.placement, self.workers, self.size = placement, workers, size
        self._folder, self._name = folder, name
        self._numbers = itertools.count()
        self._product = self._receiver(f"unix:{folder}/{name}")
        self._exit = contextlib.ExitStack()

    def _receiver(self, address: str | None) -> Product:
        return Product(
            self._folder, self._name, address, workers=self.workers, placement=self.placement
        )

    def __enter__(self) -> Scene:
        try:
            self._product.start()
            self._exit.callback(lambda: self._product.close())
            self.source = self._exit.enter_context(PageSource(self._product.uri, self.size))
            self.guest = GuestProcess(self._product.attach_path, BLOCK)
            self._exit.callback(self.guest.close)
            self.guest.wait_attached()
            self._view = self._exit.enter_context(ReceiverView(self._product.name))
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def status(self) -> str:
        return self._view.info()["status"]

    def recover(self) -> None:
        """What an operator does when the migration is paused, as soon as it is."""
        self._wait(lambda: self.status() == "postcopy-paused", "was not paused")
        uri = f"unix:{self._folder}/{self._name}.{next(self._numbers)}"
        asyncio.run(self._product.execute("migrate-recover", uri=uri))
        self.source.resume(uri)

    def succeed(self) -> None:
        """Kills the receiver with all its processes and starts a successor."""
        for pid in self._product.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._product.finish()
        self._product = self._receiver(None)
        self._product.start()

    def _wait(self, reached: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + RECOVER_SECONDS
        while not reached():
            if time.monotonic() > deadline:
                raise GuestLost(f"the migration {otherwise} for {RECOVER_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)

    def shards(self) -> list[dict]:
        return self._view.info()["sharded"]["shards"]

    def stall_ms(self, first: int, count: int, seed: int, strike: Callable[[], None]) -> float:
        """The longest wait for one of `count` pages; `strike` is called in the middle.
        UsageError: the guest was through before."""
        with ThreadPoolExecutor(1) as beside:
            touching = beside.submit(self.guest.touch, seed, 1, FIRST_BYTE, first, count)
            time.sleep(STRIKE_SECONDS)
            if touching.done():
                raise UsageError(f"--size: a sample of {count} pages is over before the loss")
            strike()  # on this thread: a receiver that it starts dies with the thread
            touched = touching.result()
        self.source.check()
        return max(touched.latencies) / 1e6


class Case:
    """What is lost in the middle of a sample; this one: nothing, what the others are compared
    with.  `mend()` returns when the next sample may begin."""

    name = "nothing"

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def strike(self) -> None: ...

    def mend(self) -> None: ...


class WorkerKilled(Case):
    """One worker, each in its turn."""

    name = "worker-killed"
    signo = signal.SIGKILL
    pause_seconds = DEATHS_SECONDS / (DEATHS_MOST - 1) + 0.1
    """between two deaths of a shard, so that it is not given up"""
    spare_seconds = 0.5
    """they start one after the other"""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._turns = itertools.cycle(range(scene.workers))
        self._expected = 0

    def victims(self) -> list[int]:
        return [next(self._turns)]

    def strike(self) -> None:
        shards, victims = self.scene.shards(), self.victims()
        self._expected = sum(shard["restarts"] for shard in shards) + len(victims)
        for victim in victims:
            os.kill(shards[victim]["pid"], self.signo)

    def mend(self) -> None:
        """The successors serve, and the next spares have had time to start."""
        deadline = time.monotonic() + RECOVER_SECONDS
        while sum(shard["restarts"] for shard in self.scene.shards()) < self._expected:
            if time.monotonic() > deadline:
                raise GuestLost("a lost worker got no successor")
            time.sleep(0.001)
        time.sleep(max(self.pause_seconds, self.spare_seconds * self.scene.workers))


class WorkerStopped(WorkerKilled):
    """It lives and does nothing."""

    name = "worker-stopped"
    signo = signal.SIGSTOP


class WorkersKilled(WorkerKilled):
    """All at once."""

    name = "workers-killed"

    def victims(self) -> list[int]:
        return list(range(self.scene.workers))


class WireCut(Case):
    """Closed without a word, and recovered at once by somebody who looks at the status."""

    name = "wire-cut"

    def strike(self) -> None:
        self.scene.source.cut()
        self.scene.recover()


class ReceiverKilled(Case):
    """Coordinator and workers; `--resume` and a recovery follow at once."""

    name = "receiver-killed"

    def strike(self) -> None:
        self.scene.source.expect_loss()
        self.scene.succeed()
        self.scene.recover()


CASES = {
    case.name: case
    for case in (WorkerKilled, WorkerStopped, WorkersKilled, WireCut, ReceiverKilled)
}
