"""An engine with its connections, regions and transfers, by number. Knows nothing about UCCL's interface."""

from __future__ import annotations

import contextlib
import ctypes as c
import itertools
import os
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ._buffers import Memory
from ._events import Events
from ._library import FIFO_SIZE, ChannelStats, ConnectionStats, FifoItem, Option, TransferInfo, XferPath, library
from .errors import CANCELED, IN_PROGRESS, NOT_FOUND, RESOURCE, TIMED_OUT, UcclError, error, invalid

# A blocking call comes back to the interpreter so often, for signals such as Ctrl-C.
SLICE_MS = 100
# The number of a transfer: its connection, and the library's number of it there; or of several transfers together.
_CONNECTION_SHIFT = 40
_TOGETHER = 1 << 62

# Memory of which the library cannot say that no device uses it any more.
_abandoned: List[Any] = []


class Notification(NamedTuple):
    """A notification as the peer sent it."""

    name: bytes
    message: bytes


class Progress(NamedTuple):
    """The state of a transfer. `total` is the length of a received message, once it is known."""

    done: bool
    moved: int
    total: int


class Path(NamedTuple):
    """What carried bytes of a connection, in both directions.

    `carrier` is a word of UCCL_TCPX_REQUIRE: tcp, tcpx, tcpxo, devmem, direct or nvlink, or eager for what travelled in control messages. `nic` and
    `plugin` are empty where there is none. `lost` counts those of its channels that are lost at present."""

    carrier: str
    nic: str
    plugin: str
    bytes: int
    channels: int
    lost: int


class TransferPath(NamedTuple):
    """What carried a transfer, counted while it moved; empty before its first byte.

    `carriers` are words as in `Path`, `nics` this host's NICs of the channels that moved bytes of it."""

    carriers: Tuple[str, ...]
    nics: Tuple[str, ...]


class Segment(NamedTuple):
    """A range of a local region, and a FIFO item for the peer's."""

    region: int
    addr: int
    size: int
    item: bytes


def deadline(timeout: Optional[float]) -> Optional[float]:
    """When a timeout (seconds) has passed."""
    return None if timeout is None else time.monotonic() + timeout


def slices(until: Optional[float]) -> Iterator[int]:
    """Milliseconds of the waits that a blocking call is made of: at least one, the last at the deadline."""
    while True:
        left = SLICE_MS if until is None else max(0, round((until - time.monotonic()) * 1000))
        yield min(left, SLICE_MS)
        if until is not None and time.monotonic() >= until:
            return


def timed_out(what: str, timeout: Optional[float]) -> UcclError:
    """The exception for a wait that took too long."""
    return error(TIMED_OUT, f"{what} did not end within {timeout} s")


def _c_array(kind: Any, values: Sequence[Any]) -> Any:
    return (kind * len(values))(*values)


class Core:
    """All methods may be called from any thread."""

    def __init__(self, options: Mapping[str, object]) -> None:
        self.lib = library()
        self._pid = os.getpid()
        # A finalizer that closes may run in a thread that holds it.
        self._lock = threading.RLock()
        self._connections: Dict[int, int] = {}
        self._regions: Dict[int, Memory] = {}
        self._together: Dict[int, List[int]] = {}
        self._numbers = itertools.count()
        self._marks = itertools.count(_TOGETHER)
        # A message of several buffers is sent and received as several, in one order.
        self._ordered = threading.Lock()
        settings = [Option(str(name).encode(), str(value).encode()) for name, value in options.items()]
        handle = c.c_void_p()
        self.lib.check(self.lib.create_with(_c_array(Option, settings), len(settings), c.byref(handle)))
        self._handle: Optional[int] = handle.value
        self.events = Events(self._event_fd)

    @property
    def handle(self) -> int:
        """The engine.

        Raises: UcclError after close, and in a child process after a fork."""
        if os.getpid() != self._pid:
            raise UcclError(NOT_FOUND, "this endpoint belongs to the parent process: create another after the fork")
        handle = self._handle
        if handle is None:
            raise UcclError(CANCELED, "the endpoint is closed")
        return handle

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle is None

    def close(self) -> None:
        """Ends the engine, and only then lets go of registered buffers. In a child process after a fork it does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            handle, self._handle = self._handle, None
            connections = list(self._connections.values())
            self._connections.clear()
        if handle is None:
            return
        self.lib.destroy(handle)
        for connection in connections:
            self.lib.conn_destroy(connection)
        self.events.close()
        with self._lock:
            self._regions.clear()

    def metadata(self) -> str:
        """Where the engine listens."""
        return self._text("metadata_into")

    def stats(self) -> str:
        """Statistics for people."""
        return self._text("stats_text")

    def _text(self, call: str) -> str:
        needed, length = c.c_size_t(), 256
        while True:
            buffer = c.create_string_buffer(length)
            status = getattr(self.lib, call)(self.handle, buffer, length, c.byref(needed))
            if status != RESOURCE or needed.value <= length:
                self.lib.check(status)
                return buffer.value.decode(errors="replace")
            length = needed.value + 1024

    def _event_fd(self) -> int:
        fd = c.c_int()
        self.lib.check(self.lib.event_fd(self.handle, c.byref(fd)))
        return fd.value

    # Connections

    def connect(self, address: str, gpu: str, port: int) -> int:
        """Connects; blocks for at most UCCL_TCPX_CONNECT_TIMEOUT_MS."""
        handle = self.lib.connect(self.handle, address.encode(), gpu.encode(), port, False)
        if not handle:
            raise self.lib.failure()
        return self._add_connection(handle)

    def accept(self, milliseconds: int) -> Optional[Tuple[str, int, int]]:
        """Address and GPU of the peer, and the connection's number; None when none has come."""
        address, gpu, found = c.create_string_buffer(64), c.c_int(), c.c_void_p()
        status = self.lib.accept_for(self.handle, milliseconds, address, len(address), c.byref(gpu), c.byref(found))
        if self.lib.check(status) == IN_PROGRESS:
            return None
        return address.value.decode(), gpu.value, self._add_connection(found.value)

    def paths(self, number: int) -> List[Path]:
        """What carried the bytes of a connection so far, by carrier and NIC."""
        handle = self.connection(number)
        stats = ConnectionStats(size=c.sizeof(ConnectionStats))
        self.lib.check(self.lib.conn_stats(handle, c.byref(stats)))
        found: Dict[Tuple[str, str, str], Path] = {}

        def add(carrier: str, nic: str, plugin: str, moved: int, channels: int, lost: int) -> None:
            path = found.get((carrier, nic, plugin), Path(carrier, nic, plugin, 0, 0, 0))
            found[carrier, nic, plugin] = Path(carrier, nic, plugin, path.bytes + moved, path.channels + channels, path.lost + lost)

        for channel in range(stats.channels):
            one = ChannelStats(size=c.sizeof(ChannelStats))
            status = self.lib.channel_stats(handle, channel, c.byref(one))
            if status == NOT_FOUND:
                # The connection has ended meanwhile.
                break
            self.lib.check(status)
            plugin, moved = one.plugin.decode(), one.sent_bytes + one.received_bytes
            carrier = one.carrier.decode() or plugin
            if carrier == "direct":
                nvlink = min(one.nvlink_bytes, moved)
                add("direct", "", "", moved - nvlink, 0, 0)
                if nvlink:
                    add("nvlink", "", "", nvlink, 0, 0)
            else:
                add(carrier, one.nic.decode(errors="replace"), plugin, moved, 1, one.lost)
        eager = stats.eager_sent_bytes + stats.eager_received_bytes
        if eager:
            add("eager", "", "", eager, 0, 0)
        return list(found.values())

    def _add_connection(self, handle: Any) -> int:
        with self._lock:
            if self._handle is not None:
                number = next(self._numbers)
                self._connections[number] = handle
                return number
        self.lib.conn_destroy(handle)
        return self.handle

    def connection(self, number: int) -> int:
        """The handle of a connection."""
        handle = self._connections.get(number)
        if handle is None:
            _ = self.handle
            raise UcclError(NOT_FOUND, f"Invalid conn_id {number}: no such connection, or it was removed")
        return handle

    def disconnect(self, number: int) -> bool:
        """Closes a connection; False if there is none of this number."""
        _ = self.handle
        with self._lock:
            handle = self._connections.pop(number, None)
        if handle is None:
            return False
        self.lib.conn_destroy(handle)
        return True

    def is_up(self, number: int) -> bool:
        """Whether a connection is open."""
        handle = self._connections.get(number)
        return handle is not None and self.lib.conn_status(handle) == 0

    # Memory

    def register(self, memory: Memory, access: int) -> int:
        """The number of a new region. It keeps the memory's owner until it is deregistered or the engine is closed."""
        region = c.c_uint64()
        self.lib.check(self.lib.reg_with(self.handle, memory.addr, memory.size, access, c.byref(region)))
        with self._lock:
            if self._handle is not None:
                self._regions[region.value] = memory
                return region.value
        return self.handle

    def deregister(self, number: int) -> bool:
        """Ends a region; False if there is none of this number. Waits for its transfers, and then lets go of its memory."""
        handle = self.handle
        with self._lock:
            memory = self._regions.pop(number, None)
        if memory is None:
            return False
        # The function returns nothing, so its status is told from that of a failure just before.
        self.lib.poll(None, 0, None)
        self.lib.mr_destroy(handle, number)
        if self.lib.last_status() == RESOURCE:
            _abandoned.append(memory)
        return True

    def region(self, number: int) -> Memory:
        """The memory of a region."""
        memory = self._regions.get(number)
        if memory is None:
            _ = self.handle
            raise UcclError(NOT_FOUND, f"Invalid mr_id {number}: no such region, or it was deregistered")
        return memory

    def item(self, region: int, addr: int, size: int) -> bytes:
        """A FIFO item."""
        buffer = c.create_string_buffer(FIFO_SIZE)
        self.lib.check(self.lib.prepare_fifo(self.handle, region, addr, size, buffer))
        return buffer.raw

    # Transfers

    def _start(self, call: Callable[..., int], connection: int, *arguments: Any) -> int:
        number = c.c_uint64()
        self.lib.check(call(self.connection(connection), *arguments, c.byref(number)))
        return connection << _CONNECTION_SHIFT | number.value

    def _writable(self, region: int) -> None:
        if self.region(region).readonly:
            raise invalid(f"region {region} is a read-only buffer: nothing can be received or read into it")

    def one_sided(self, connection: int, write: bool, segments: Sequence[Segment]) -> int:
        """Starts a read or write; returns the transfer's number."""
        if not write:
            for region in {segment.region for segment in segments}:
                self._writable(region)
        if any(len(segment.item) != FIFO_SIZE for segment in segments):
            raise invalid(f"meta must be the {FIFO_SIZE} bytes that the peer's advertise returned")
        if not segments:
            raise invalid("a transfer without segments")
        if len(segments) == 1:
            region, addr, size, item = segments[0]
            call = self.lib.write if write else self.lib.read
            return self._start(call, connection, region, addr, size, FifoItem.from_buffer_copy(item))
        regions, addresses, sizes, items = zip(*segments)
        call = self.lib.write_vector if write else self.lib.read_vector
        return self._start(
            call,
            connection,
            _c_array(c.c_uint64, regions),
            _c_array(c.c_void_p, addresses),
            _c_array(c.c_size_t, sizes),
            (FifoItem * len(items)).from_buffer_copy(b"".join(items)),
            len(segments),
        )

    def send(self, connection: int, region: int, addr: int, size: int) -> int:
        """Starts a two-sided send."""
        return self._start(self.lib.send, connection, region, addr, size)

    def receive(self, connection: int, region: int, addr: int, size: int) -> int:
        """Starts a two-sided receive."""
        self._writable(region)
        return self._start(self.lib.recv_async, connection, region, addr, size)

    def together(self, start: Callable[..., int], connection: int, ranges: Sequence[Tuple[int, int, int]]) -> int:
        """Starts a send or a receive of each range, in order, under one number."""
        with self._ordered:
            numbers = [start(connection, *each) for each in ranges]
        with self._lock:
            number = next(self._marks)
            self._together[number] = numbers
        return number

    def _parts(self, number: int) -> Sequence[int]:
        if not number & _TOGETHER:
            return (number,)
        parts = self._together.get(number)
        if parts is None:
            _ = self.handle
            raise UcclError(NOT_FOUND, f"Invalid transfer_id {number}: it was reported as done, or never started")
        return parts

    def forget(self, number: int) -> None:
        """The end of a transfer was reported. Only transfers with several parts take memory."""
        if number & _TOGETHER:
            with self._lock:
                self._together.pop(number, None)

    def poll(self, number: int) -> Progress:
        """The state of a transfer.

        Raises: UcclError when it has failed."""
        done, moved, total = True, 0, 0
        info = TransferInfo()
        for part in self._parts(number):
            handle = self.connection(part >> _CONNECTION_SHIFT)
            status = self.lib.check(self.lib.poll(handle, part & (1 << _CONNECTION_SHIFT) - 1, c.byref(info)))
            done, moved, total = done and status != IN_PROGRESS, moved + info.bytes_done, total + info.bytes_total
        return Progress(done, moved, total)

    def transfer_path(self, number: int) -> TransferPath:
        """What carried a transfer."""
        carriers: List[str] = []
        nics: List[str] = []
        answer = XferPath()
        for part in self._parts(number):
            answer.size = c.sizeof(XferPath)
            handle = self.connection(part >> _CONNECTION_SHIFT)
            self.lib.check(self.lib.xfer_path(handle, part & (1 << _CONNECTION_SHIFT) - 1, c.byref(answer)))
            for words, text in ((carriers, answer.carriers), (nics, answer.nics)):
                words += [word for word in text.decode(errors="replace").split(",") if word and word not in words]
        return TransferPath(tuple(carriers), tuple(nics))

    def wait(self, number: int, timeout: Optional[float]) -> bool:
        """Blocks until a transfer has ended; False after the timeout (seconds).

        Raises: UcclError when it has failed."""
        until = deadline(timeout)
        for part in self._parts(number):
            connection, own = part >> _CONNECTION_SHIFT, part & (1 << _CONNECTION_SHIFT) - 1
            for limit in slices(until):
                if self.lib.check(self.lib.wait(self.connection(connection), own, limit)) != IN_PROGRESS:
                    break
            else:
                return False
        return True

    # Notifications

    def notify(self, connection: int, name: bytes, message: bytes) -> None:
        """Sends a notification."""
        self.lib.check(self.lib.send_notif_bytes(self.connection(connection), name, len(name), message, len(message)))

    def notification(self, milliseconds: Optional[int]) -> Optional[Notification]:
        """The oldest notification, waiting for one if a time is given."""
        found, length = c.c_void_p(), c.c_size_t()
        if milliseconds is None:
            status = self.lib.notif_next(self.handle, c.byref(found))
        else:
            status = self.lib.notif_wait(self.handle, milliseconds, c.byref(found))
        self.lib.check(status)
        if not found.value:
            return None
        with contextlib.ExitStack() as end:
            end.callback(self.lib.notif_free, found)
            name = c.string_at(self.lib.notif_name(found, c.byref(length)), length.value)
            message = c.string_at(self.lib.notif_msg(found, c.byref(length)), length.value)
        return Notification(name, message)


__all__ = ["Core", "Notification", "Progress", "Segment", "deadline", "slices", "timed_out"]
