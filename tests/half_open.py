"""A real QEMU's postcopy over TCP whose network goes away without a word, and its recovery:

    python -m tests.half_open FOLDER NAME QEMU

in a network namespace of its own, whose loopback goes down and comes up again.  Prints one JSON
object: why the receiver paused, and what the source said then, or why not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.lost_network import enter_namespace, set_loopback
from tests.qemu import backports
from tests.test_recovery_qemu import Operator, check_end, operated

INCOMING = (
    "tcp:127.0.0.1:0,keep-alive=on,keep-alive-idle=1,keep-alive-interval=1,keep-alive-count=2"
)
"""Three seconds; the default is a minute."""


def lose(operator: Operator) -> dict[str, str]:
    source = operator.vms.source
    set_loopback(up=False)
    operator.wait("postcopy-paused")
    paused = operator.control.execute("query-migrate", {})
    said = {"paused by": paused["error-desc"], "source": source.query_migrate()["status"]}
    source.qmp("migrate-pause")
    source.wait_migration("postcopy-paused")
    set_loopback(up=True)
    return said


def main(folder: str, name: str, version: str) -> None:
    try:
        enter_namespace()
    except OSError as error:
        print(json.dumps({"n/a": error.strerror}))
        return
    set_loopback(up=True)
    (binary,) = [each for each in backports.available_qemus() if str(each) == version]
    with operated(Path(folder), name, binary, incoming=INCOMING) as operator:
        said = lose(operator)
        operator.recover("tcp:127.0.0.1:0")
        check_end(operator)
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
