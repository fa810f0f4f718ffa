"""A receiver that is told no paths of sockets: they stand in its own folder."""

from __future__ import annotations

from tests.receiver import Receiver, Resumes


class OwnFolder(Receiver):
    """As Receiver; `attach_path` and `control_path` are in `runtime_folder()`."""

    def start(self) -> Receiver:
        self.attach_path = self.runtime_folder() / "attach"
        self.control_path = self.runtime_folder() / "control"
        return super().start()

    def socket_options(self) -> list[str]:
        return []


class OwnSuccessor(Resumes, OwnFolder):
    """`receive --resume NAME` of such a one."""
