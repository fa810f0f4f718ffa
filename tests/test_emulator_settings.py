"""The emulator's settings, and what it reads from a command line."""

from __future__ import annotations

import pytest

from sharded_pc.cli.emulate import _receiver_name
from sharded_pc.emulator import settings
from sharded_pc.errors import UsageError
from sharded_pc.geometry import Placement
from sharded_pc.qemu_args import management
from sharded_pc.shm import check_name

SOCKET = "-chardev socket,id=charmonitor,fd=26,server=on,wait=off"
CONTROL = "-mon chardev=charmonitor,id=monitor,mode=control"
QAPI = (
    '-chardev {"id":"charmonitor","backend":{"type":"socket","data":'
    '{"addr":{"type":"fd","data":{"str":"26"}},"server":true}}}'
)


class TestFile:
    @pytest.fixture(autouse=True)
    def _only_this_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(settings, "EVERYWHERE", tmp_path / "everywhere.toml")

    def test_none(self, tmp_path):
        assert settings.read(tmp_path) == settings.EmulatorSettings()

    def test_beside_the_emulator_counts_more(self, tmp_path):
        settings.EVERYWHERE.write_text('workers = 3\nplacement = "copy"\nguests = ["a*"]\n')
        (tmp_path / settings.FILE).write_text('workers = 4\nleast-memory = "2G"\n')
        found = settings.read(tmp_path)
        assert (found.workers, found.placement, found.least_memory) == (4, Placement.COPY, 2 << 30)
        assert found.why_not("abc", 2 << 30) is None
        assert "none of `guests`" in str(found.why_not("b", 2 << 30))
        assert "least-memory" in str(found.why_not("abc", 1 << 30))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("worker = 1", "no key 'worker'; there are qemu, "),
            ("workers = 'x'", "workers = 'x' is none of its values"),
            ("workers = true", "workers = True is none"),
            ("placement = 'fast'", "placement = 'fast' is none"),
            ("guests = 'a'", "guests = 'a' is none"),
            ("strict = 1", "strict = 1 is none"),
            ("least-memory = '2X'", "least-memory = '2X' is none"),
            ("log-level = 'loud'", "log-level = 'loud' is none"),
            ("strict = ", "sharded-pc.toml: Invalid value"),
        ],
    )
    def test_bad(self, tmp_path, text, says):
        (tmp_path / settings.FILE).write_text(text)
        with pytest.raises(UsageError, match=r".*/sharded-pc\.toml: .*") as caught:
            settings.read(tmp_path)
        assert says in str(caught.value)


MON = "-mon m,mode=control"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{SOCKET} {CONTROL}", "fd:26"),
        (f"{QAPI} {CONTROL}", "fd:26"),
        ("-chardev socket,id=m,path=/a,,b,server=on -mon m,mode=control", "/a,b"),
        ("-qmp unix:/run/q,server=on,wait=off", "/run/q"),
        ("-qmp unix:/run/q,server,nowait", "/run/q"),
        ("-qmp tcp:127.0.0.1:1,server=on", None),
        ("-qmp unix:/run/q", None),
        (f"{SOCKET} -mon chardev=charmonitor,mode=readline", None),
        (f"{CONTROL}", None),
        ("-qmp stdio", None),
        (f'-chardev {{"id":"m","backend":{{"type":"socket","data":{{"addr":[]}}}}}} {MON}', None),
        (f'-chardev {{"id":"m","backend":{{"type":"socket","data":[]}}}} {MON}', None),
        (f"-chardev socket,id=m,fd=²,server=on {MON}", None),
    ],
)
def test_monitor(text, found):
    assert management.monitor_listener(["qemu", *text.split()]) == found


def test_names():
    words = ["qemu", "-name", "guest=a b,debug-threads=on", "-incoming", "tcp:0:1"]
    assert management.guest_name(words) == "a b"
    assert management.guest_name(["qemu", "-name", "c"]) == "c"
    assert management.guest_name(["qemu"]) == ""
    assert management.incoming(words) == "tcp:0:1"
    assert management.deferred(words)[-1] == "defer"


def test_receivers_of_guests():
    """The same each time, legal, and another for another guest."""
    guests = ["g1", "a b", "a/b", "x" * 300, "ü", "sem", ""]
    names = [_receiver_name(guest) for guest in guests]
    assert names == [_receiver_name(guest) for guest in guests]
    assert len(set(names)) == len(names) and names[0] == "g1"
    assert all(check_name(name) for name in names)
