"""A receiver seen from another process: its control segment and bitmaps, mapped."""

from __future__ import annotations

from sharded_pc import shm
from sharded_pc.errors import HostError
from sharded_pc.native.control import Bitmap, Control
from sharded_pc.observe.status import migration_info
from sharded_pc.shm import Segment


class ReceiverView:
    """`with ReceiverView(name) as view: view.info()`.  FileNotFoundError, HostError.

    Bitmaps are gone once a receiver has exited with --keep; all pages are there then.
    """

    def __init__(self, name: str) -> None:
        self.name = shm.check_name(name)
        self._segment = Segment.open(f"/{name}{shm.CONTROL}")
        if not self._segment.size:
            self._segment.close()
            raise FileNotFoundError(f"{name!r} is only being made")
        self._control = Control(self._segment.map)
        if not self._control.is_valid():
            self.close()
            raise HostError(f"shared memory of {name!r} is of another version")

    @property
    def owner(self) -> int:
        """The receiver's pid."""
        return self._control.view.owner

    def info(self) -> dict:
        return migration_info(self.name, self._control, self._received())

    def _received(self) -> list[int]:
        ram = self._control.geometry
        if ram is None:
            return []
        try:
            segment = Segment.open(f"/{self.name}{shm.BITMAPS}")
        except FileNotFoundError:
            return [block.pages for block in ram.blocks]
        received = Bitmap(segment.map, 0, segment.size // 2)
        try:
            return [
                received.count(self._control.block(i)[2], block.pages)
                for i, block in enumerate(ram.blocks)
            ]
        finally:
            received.release()
            segment.close()

    def close(self) -> None:
        self._control.release()
        self._segment.close()

    def __enter__(self) -> ReceiverView:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
