"""Methods that run in the event loop for whoever calls them from another thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class HasLoop(Protocol):
    loop: asyncio.AbstractEventLoop


S = TypeVar("S", bound=HasLoop)
P = ParamSpec("P")


def from_stream(
    method: Callable[Concatenate[S, P], Awaitable[Any]],
) -> Callable[Concatenate[S, P], Any]:
    """The coroutine method as the stream's thread calls it: runs in `self.loop`, is waited for, and
    raises there what it raised here.  Never call it from the loop itself."""

    @functools.wraps(method)
    def call(self: S, *args: P.args, **options: P.kwargs) -> Any:
        return asyncio.run_coroutine_threadsafe(method(self, *args, **options), self.loop).result()

    return call
