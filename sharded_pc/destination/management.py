"""What whoever manages a destination QEMU (libvirt) hears of the migration at QEMU's own monitor.

It sees one QEMU that takes a migration: the receiver's statuses, its answers to the commands that
are the migration's, and QEMU's to all others.  Words are QEMU's (qapi/migration.json).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError, QMPError

from sharded_pc.address import Address, FdAddress, TcpAddress, UnixAddress, parse
from sharded_pc.destination.monitor import Monitor
from sharded_pc.destination.relay import Relay
from sharded_pc.errors import QmpError, ShardedPcError
from sharded_pc.state import MigrationStatus

if TYPE_CHECKING:
    from sharded_pc.transport.tls.credentials import Credentials

log = logging.getLogger(__name__)

OURS = (
    "compress", "multifd", "postcopy-preempt", "postcopy-ram", "x-ignore-shared", "xbzrle",
    "zero-copy-send",
)  # fmt: skip
"""Capabilities that QEMU does not get: they are the source's stream's, not the one's that it is
fed."""
REFUSED = ("background-snapshot", "dirty-bitmaps", "mapped-ram", "switchover-ack", "validate-uuid",
           "x-colo")  # fmt: skip
"""What this receiver cannot take, or must know from the start."""
TLS = ("tls-creds", "tls-hostname", "tls-authz")
"""Parameters that QEMU gets when it has taken what it is fed: that comes without TLS."""
_SHOWN = {
    MigrationStatus.CANCELLED: MigrationStatus.FAILED,
    MigrationStatus.POSTCOPY_RECOVER_SETUP: MigrationStatus.POSTCOPY_RECOVER,
}
"""libvirt 9.0 does not know the second, and takes a guest that is still paused when its source has
begun to recover for lost again: it is told before the reply to migrate-recover."""
ENDED = "There is an incoming migration: the guest can be migrated on when all of it is here"
FAILED_SECONDS = 10.0
"""For who manages QEMU to ask why it has failed, and to end it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Incoming:
    """The receiver, as these commands need it; what they call raises ShardedPcError."""

    open: Callable[[Address], None]
    recover: Callable[[Address], None]
    pause: Callable[[], None]
    status: Callable[[], tuple[MigrationStatus, str | None]]
    """and the reason of a failure or a pause"""
    where: Callable[[], Address | None]
    """a source may come"""
    require: Callable[[Credentials | None], Awaitable[None]]
    """of a source that comes from now on; None: nothing"""


class Management:
    """`path` is the socket of QEMU's relay, `qemu` our own monitor.  `resumed`: it was a dead
    receiver's, who has been told which events are wanted.  `stream_fds`: of QEMU's descriptors,
    those that this process has as well."""

    def __init__(
        self,
        path: str,
        qemu: Monitor,
        incoming: Incoming,
        *,
        resumed: bool = False,
        stream_fds: Iterable[int] = (),
    ) -> None:
        self._qemu = qemu
        self._incoming = incoming
        self._capabilities = dict.fromkeys(OURS, False)
        """of ours, as they were set"""
        self._events = resumed
        self._tls: dict[str, str] = {}
        self._no_tls: str | None = None
        """why a source that came by TLS cannot come again: it does not come without either"""
        self._told: MigrationStatus | None = None
        self._has_begun = asyncio.Event()
        """nobody is told of what a dead receiver has left as it was"""
        if not resumed:
            self._has_begun.set()
        self._stream_fds = set(stream_fds)
        self._commands: Mapping[str, Callable[[dict], Awaitable[object]]] = {
            "migrate-set-capabilities": self._set_capabilities,
            "query-migrate-capabilities": self._query_capabilities,
            "migrate-set-parameters": self._set_parameters,
            "migrate-incoming": self._migrate_incoming,
            "migrate-recover": self._migrate_recover,
            "migrate-pause": self._migrate_pause,
            "query-migrate": self._query_migrate,
        }
        self.relay = Relay(path, self._command)

    async def take_up(self) -> None:
        """What a dead receiver was told of TLS, which QEMU has since its guest runs."""
        try:
            found: dict = await self._qemu.execute("query-migrate-parameters", {})
            await self._set_tls({name: found.get(name, "") for name in TLS})
        except (QMPError, QmpError, ShardedPcError) as error:
            self._no_tls = f"the source was to come by TLS, which cannot be: {error}"
            log.error("%s; set tls-creds again", self._no_tls)

    # What it is told

    def tell(self, status: MigrationStatus) -> None:
        self._has_begun.set()
        shown = _SHOWN.get(status, status)
        is_news, self._told = shown is not self._told, shown
        if self._events and is_news and status is not MigrationStatus.CANCELLED:
            self.relay.event("MIGRATION", {"status": shown.value})

    async def leave(self, gone: Awaitable[object]) -> None:
        """The migration has completed: QEMU has its capabilities and its monitor for itself."""
        await self._qemu.set_capabilities({"events": self._events})
        own = {name: on for name, on in self._capabilities.items() if on}
        with contextlib.suppress(ExecuteError):  # one that QEMU would have refused
            await self._qemu.set_capabilities(own)
        await self.relay.leave(gone)

    async def failed(self, gone: Awaitable[object]) -> None:
        """It is heard, and asked why, before QEMU ends; not if QEMU is `gone`."""
        await self.relay.flush()
        ends = asyncio.ensure_future(gone)
        if self.relay.connected:
            await asyncio.wait({ends}, timeout=FAILED_SECONDS)
        ends.cancel()
        await asyncio.gather(ends, return_exceptions=True)

    async def close(self) -> None:
        await self.relay.close()

    # What it asks

    async def _command(self, message: dict) -> object:
        await self._has_begun.wait()
        run = self._commands.get(message.get("execute", ""))
        arguments = message.get("arguments", {})
        if run is None:
            raise QmpError(ENDED)
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        try:
            return await run(arguments)
        except ExecuteError as error:
            raise QmpError(str(error), error.error_class) from None
        except ShardedPcError as error:
            raise QmpError(str(error)) from None

    async def _set_capabilities(self, arguments: dict) -> None:
        pairs = _pairs(arguments)
        for name in REFUSED:
            if pairs.get(name):
                raise QmpError(f"the receiver of this guest cannot take {name}: migrate without it")
        ours = {name: on for name, on in pairs.items() if name in OURS}
        rest = {name: on for name, on in pairs.items() if name not in (*OURS, "events")}
        await self._qemu.set_capabilities(rest)
        self._events = pairs.get("events", self._events)
        self._capabilities |= ours

    async def _query_capabilities(self, arguments: dict) -> list[dict]:
        found = await self._qemu.execute("query-migrate-capabilities", arguments)
        seen = {**self._capabilities, "events": self._events}
        for each in found:
            each["state"] = seen.get(each["capability"], each["state"])
        return found

    async def _set_parameters(self, arguments: dict) -> None:
        tls = {name: arguments[name] or "" for name in TLS if name in arguments}
        if tls:
            await self._set_tls({**self._tls, **tls})
        await self._qemu.set_parameters(arguments, put_off=TLS)

    async def _set_tls(self, tls: dict[str, str]) -> None:
        """TLS ends here: with the credentials that QEMU was given an object of."""
        if tls.get("tls-authz"):
            raise QmpError(
                "tls-authz: the receiver of this guest lets everybody in whose certificate the "
                "authority of tls-creds has signed, and knows no other rule: migrate without it"
            )
        name = tls.get("tls-creds")
        await self._incoming.require(await self._credentials(name) if name else None)
        self._tls, self._no_tls = tls, None

    async def _credentials(self, name: str) -> Credentials:
        from sharded_pc.transport.tls.credentials import X509, Psk

        kind = await self._of_object(name, "type")
        folder = str(await self._of_object(name, "dir"))
        endpoint = await self._of_object(name, "endpoint")
        if endpoint != "server":
            raise QmpError(f"tls-creds: {name} is of endpoint={endpoint}, expected server")
        if kind == "tls-creds-psk":
            return Psk(folder)
        if kind != "tls-creds-x509":
            raise QmpError(f"tls-creds: {name} is a {kind}, which the receiver cannot use")
        return X509(folder, verify_peer=await self._of_object(name, "verify-peer") is True)

    async def _of_object(self, name: str, key: str) -> object:
        arguments = {"path": f"/objects/{name}", "property": key}
        return await self._qemu.execute("qom-get", arguments)

    async def _migrate_incoming(self, arguments: dict) -> None:
        self._incoming.open(self._address(arguments))

    async def _migrate_recover(self, arguments: dict) -> None:
        if self._no_tls is not None:
            raise QmpError(self._no_tls)
        self._incoming.recover(self._address(arguments))

    def _address(self, arguments: dict) -> Address:
        found = parse(_uri(arguments))
        if isinstance(found, FdAddress):
            if found.fd not in self._stream_fds:
                raise QmpError(
                    f"{found}: QEMU was not started with this descriptor for a stream, and its "
                    f"receiver does not have it: give a tcp: or unix: address"
                )
            self._stream_fds.remove(found.fd)  # whoever opens it closes it
        return found

    async def _migrate_pause(self, arguments: dict) -> None:
        self._incoming.pause()

    async def _query_migrate(self, arguments: dict) -> dict:
        status, why = self._incoming.status()
        if status is MigrationStatus.NONE:
            return {}
        answer: dict[str, Any] = {"status": _SHOWN.get(status, status).value}
        if why:
            answer["error-desc"] = why
        if (where := _socket_address(self._incoming.where())) is not None:
            answer["socket-address"] = [where]
        return answer


def _socket_address(where: Address | None) -> dict | None:
    """As QAPI's SocketAddress."""
    if isinstance(where, TcpAddress):
        v6 = ":" in where.host
        family = {"ipv6": True} if v6 else {"ipv4": True}
        return {"type": "inet", "host": where.host, "port": str(where.port), **family}
    return {"type": "unix", "path": where.path} if isinstance(where, UnixAddress) else None


def _pairs(arguments: dict) -> dict[str, bool]:
    try:
        return {
            str(each["capability"]): each["state"] is True for each in arguments["capabilities"]
        }
    except (KeyError, TypeError):
        raise QmpError("Parameter 'capabilities' is missing") from None


def _uri(arguments: dict) -> str:
    """`uri`, or the only one of `channels` (QEMU 8.2)."""
    channels = arguments.get("channels")
    if isinstance(channels, list):
        if len(channels) != 1 or "uri" in arguments:
            raise QmpError("Channel list must have only one entry, for type 'main'")
        return _channel_uri(channels[0])
    if not isinstance(arguments.get("uri"), str):
        raise QmpError("Parameter 'uri' is missing")
    return arguments["uri"]


def _channel_uri(channel: Any) -> str:
    try:
        at = channel["addr"]
        kind = at["type"] if at["transport"] == "socket" else at["transport"]
        if kind == "inet":
            host = f"[{at['host']}]" if ":" in at["host"] else at["host"]
            return f"tcp:{host}:{at['port']}"
        return {"unix": lambda: f"unix:{at['path']}", "fd": lambda: f"fd:{at['str']}"}[kind]()
    except (KeyError, TypeError):
        raise QmpError("this channel's address is not known here: give a uri") from None
