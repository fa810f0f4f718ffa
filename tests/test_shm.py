"""Names in shared memory: who owns them, and that nobody removes what another one lives on."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharded_pc import cli, shm
from sharded_pc.errors import HostError
from sharded_pc.geometry import Geometry, RamBlock
from sharded_pc.memory import GuestMemory
from sharded_pc.shm import Segment

STARTS = 300


def found(name: str) -> shm.Leftover | None:
    return next((each for each in shm.receivers() if each.name == name), None)


def control(name: str) -> Path:
    return shm.ROOT / f"{name}{shm.CONTROL}"


@pytest.fixture
def create(unique_name: str) -> Iterator[Callable[[], GuestMemory]]:
    """Makes a receiver's memory, under the same name each time."""
    made = []

    def make() -> GuestMemory:
        made.append(GuestMemory.create(unique_name, 1))
        return made[-1]

    yield make
    for memory in made:
        memory.close()
    for path in shm.ROOT.glob(f"{unique_name}[%.]*"):
        path.unlink()


def die(memory: GuestMemory, *, kept: bool = False) -> None:
    """As by SIGKILL: the lock is gone, the files stay."""
    if kept:
        memory.define(Geometry.of((RamBlock("pc.ram", 1 << 20),), 1))
        memory.unlink_all_but_ram()
    fcntl.flock(memory._control_segment.fd, fcntl.LOCK_UN)


@pytest.fixture
def after_create(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    """Has something happen once between a control segment's making and its owner's lock."""
    original = Segment.create.__func__

    def arrange(happening: Callable[[str], None]) -> None:
        rest = [happening]

        def making(cls: type, name: str, size: int, **options: bool) -> Segment:
            segment = original(cls, name, size, **options)
            if name.endswith(shm.CONTROL) and rest:
                rest.pop()(name.strip("/").removesuffix(shm.CONTROL))
            return segment

        monkeypatch.setattr(Segment, "create", classmethod(making))

    return arrange


def check_owned(memory: GuestMemory) -> None:
    ours = os.fstat(memory._control_segment.fd)
    assert control(memory.name).exists() and os.path.samestat(os.stat(control(memory.name)), ours)
    assert found(memory.name).alive


# --- an owner comes to its lock ---


def test_an_owner_waits_for_who_looks_at_its_segment(create, after_create, monkeypatch):
    """`clean --list` has the lock for a moment, and that moment is now."""
    others: list[int] = []

    def look(name: str) -> None:
        others.append(os.open(control(name), os.O_RDWR))
        fcntl.flock(others[0], fcntl.LOCK_EX)

    def lock(self: Segment, **options: bool) -> bool:
        taken = original(self, **options)
        if others:
            assert not taken
            os.close(others.pop())
        return taken

    original = Segment.lock
    after_create(look)
    monkeypatch.setattr(Segment, "lock", lock)
    check_owned(create())


def test_an_owner_makes_its_segment_again_if_it_was_removed(create, after_create):
    """`clean` comes before the lock, and takes it for a dead receiver's."""
    after_create(lambda name: shm.remove(found(name)))
    check_owned(create())


def test_an_owner_does_not_wait_for_ever(create, after_create, unique_name, monkeypatch):
    monkeypatch.setattr(shm, "LOCK_SECONDS", 0.05)
    others: list[Segment] = []

    def sit(name: str) -> None:
        others.append(Segment.open(f"/{name}{shm.CONTROL}"))
        assert others[0].lock()

    after_create(sit)
    with pytest.raises(HostError, match=r"lock shared memory .* another --name"):
        create()
    others[0].close()
    assert not control(unique_name).exists()


def test_a_name_that_somebody_else_took_is_theirs(create, after_create):
    """Removed before the lock, and made by another receiver at once."""

    def take(name: str) -> None:
        shm.remove(found(name))
        others.append(GuestMemory.create(name, 1))

    others: list[GuestMemory] = []
    after_create(take)
    with pytest.raises(HostError, match="exists already"):
        create()
    check_owned(others[0])
    others[0].close()


def test_starts_among_many_lookers(create, unique_name):
    """Whoever lists and removes meanwhile, each start ends with a memory that is its own."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            if (seen := found(unique_name)) and not seen.alive:
                shm.remove(seen)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(STARTS):
            memory = create()
            check_owned(memory)
            memory.unlink()
    finally:
        over.set()
        for thread in lookers:
            thread.join()


# --- what is removed ---


def test_the_dead_are_removed_whole(create, unique_name):
    die(create())
    done: list[bool] = []
    assert shm.remove(found(unique_name), lambda: done.append(control(unique_name).exists()))
    assert done == [True], "what else was left goes first, while the name is held"
    assert list(shm.ROOT.glob(f"{unique_name}*")) == []


def test_an_interrupted_removal_is_found_again(create, unique_name, monkeypatch):
    """What is left of a dead one looks dead after every step, never kept."""
    memory = create()
    memory.define(Geometry.of((RamBlock("pc.ram", 1 << 20),), 1))
    die(memory)
    states: list[str] = []

    def unlink(self: Segment) -> None:
        (shm.ROOT / self.name.lstrip("/")).unlink()
        files = tuple(path.name for path in shm._files(unique_name))
        states.append(shm.Leftover(unique_name, files, 0, alive=False).state)

    monkeypatch.setattr(Segment, "unlink", unlink)
    assert shm.remove(found(unique_name))
    assert states == ["dead"] * 4


def test_who_came_after_the_look_is_left_alone(create, unique_name):
    """The dead one's name has an owner again, or RAM that was left on purpose, or is gone."""
    die(create())
    dead = found(unique_name)
    assert shm.remove(dead)
    assert not shm.remove(dead, pytest.fail), "gone"
    living = create()
    assert not shm.remove(dead, pytest.fail), "alive"
    check_owned(living)
    die(living, kept=True)
    assert found(unique_name).kept
    assert not shm.remove(dead, pytest.fail), "kept"
    assert shm.remove(dataclasses.replace(dead, files=found(unique_name).files))


def test_clean_leaves_the_socket_of_who_came_after_its_look(
    create, unique_name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    die(create())
    dead = found(unique_name)
    assert shm.remove(dead)
    check_owned(create())
    monkeypatch.setattr(shm, "receivers", lambda: iter([dead]))
    assert cli.main(["clean", "--name", unique_name]) == 0
    assert "left alone: it has changed meanwhile" in capsys.readouterr().out
    assert control(unique_name).exists()


def test_who_removes_lets_others_finish_their_look(create, unique_name, monkeypatch):
    """A look is no owner: `clean` would leave a dead one's memory and say that it has changed."""
    die(create())
    dead = found(unique_name)
    with contextlib.ExitStack() as other:
        assert not other.enter_context(shm._looked_at(unique_name)).alive
        monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
        assert shm.remove(dead)


def test_two_who_look_do_not_take_each_other_for_an_owner(create, unique_name):
    die(create())
    with shm._looked_at(unique_name) as one, shm._looked_at(unique_name) as other:
        assert not one.alive and not other.alive
