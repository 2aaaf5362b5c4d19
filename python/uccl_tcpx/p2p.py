"""UCCL's Python interface, `uccl.p2p`, over libuccl_p2p: change `from uccl import p2p` into `from uccl_tcpx import p2p`.

Methods have UCCL's names, arguments and results. Two things differ:

- What fails raises UcclError, a RuntimeError with a status and a text; the leading True of a result is there for UCCL's programs.
  `dereg` and `remove_remote_endpoint` return False for a number that they do not know.
- Where UCCL takes an address and a size, a buffer is taken too: a bytearray, a memoryview, a numpy array, a torch tensor, or anything
  with __cuda_array_interface__; the size may then be None. A buffer that was registered is kept until it is deregistered.

Any thread may call any method. After a fork the child creates endpoints of its own: those of the parent raise UcclError there.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import enum
import struct
import threading
import weakref
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ._aio import Aio
from ._buffers import Memory, memory_of
from ._core import Core, Notification, Path, Progress, Segment, TransferPath, deadline, slices, timed_out
from ._library import ACCESS_REMOTE_READ, ACCESS_REMOTE_WRITE, FIFO_SIZE, library
from ._passive import accept_passively
from .errors import UNSUPPORTED, ConnectionLost, InvalidArgument, TimedOut, UcclError, invalid

__all__ = [
    "ACCESS_REMOTE_READ",
    "ACCESS_REMOTE_WRITE",
    "ConnectionLost",
    "Endpoint",
    "FloatType",
    "InvalidArgument",
    "Notification",
    "Path",
    "Progress",
    "Region",
    "TimedOut",
    "TransferPath",
    "UcclError",
    "XferDesc",
    "XferHandle",
    "get_oob_ip",
    "kBFloat16",
    "kFloat16",
    "kFloat32",
    "kFloat8E4M3FN",
    "kFloat8E5M2",
    "kUndefined",
]

_NO_REGION = _UNKNOWN = (1 << 64) - 1
_WORDS = FIFO_SIZE // 4


class FloatType(enum.IntEnum):
    """Kinds of numbers, for UCCL's compression. This library compresses nothing and ignores them."""

    kUndefined = 0
    kFloat16 = 1
    kBFloat16 = 2
    kFloat32 = 3
    kFloat8E4M3FN = 4
    kFloat8E5M2 = 5


kUndefined = FloatType.kUndefined
kFloat16 = FloatType.kFloat16
kBFloat16 = FloatType.kBFloat16
kFloat32 = FloatType.kFloat32
kFloat8E4M3FN = FloatType.kFloat8E4M3FN
kFloat8E5M2 = FloatType.kFloat8E5M2


class XferHandle(NamedTuple):
    """A transfer, as UCCL describes it."""

    conn_id: int
    op_name: str
    transfer_id: int


class XferDesc:
    """Memory for `Endpoint.transfer`, here or at the peer.

    `rkeys` are the words of the region's FIFO item: every holder can access the region. `addr` and `size` may be set to a part of the
    region. `mr_id` is meaningful in the process that registered the memory, and `lkeys` nowhere."""

    __slots__ = ("addr", "size", "mr_id", "lkeys", "rkeys")

    def __init__(self) -> None:
        self.addr = 0
        self.size = 0
        self.mr_id = _NO_REGION
        self.lkeys: List[int] = []
        self.rkeys: List[int] = []

    def __repr__(self) -> str:
        return f"<XferDesc addr={self.addr} size={self.size} mr_id={self.mr_id}>"


class Region(NamedTuple):
    """Registered memory, as `Endpoint.registered` returns it. `item` gives a peer access to it."""

    mr_id: int
    addr: int
    size: int
    item: bytes


Buffer = Any
"""An address (with a size), a buffer, a numpy array, a torch tensor, or an object with __cuda_array_interface__."""


def get_oob_ip() -> str:
    """The address that a new endpoint's metadata names."""
    with Endpoint() as endpoint:
        return Endpoint.parse_metadata(endpoint.get_metadata())[0]


class Endpoint:
    """An engine: a listening port, registered memory, connections, and the threads that move data.

    `close` ends it, as do the end of a `with` block, the loss of the last reference, and the end of the program."""

    def __init__(self, local_gpu_idx: Optional[int] = None, *, options: Mapping[str, object] = {}) -> None:
        """Creates an engine.

        local_gpu_idx: the GPU whose PCI address the metadata names. It is taken from the thread's current CUDA device, so this argument
            selects the device, with torch, while the engine is created; without torch, or without a GPU, it is ignored. Memory of any
            GPU can be registered.
        options: settings that override the environment, such as {"UCCL_TCPX_NUM_CHANNELS": 8}; docs/configuration.md lists them.
        """
        with _device(local_gpu_idx):
            self._core = Core(options)
        self._end = weakref.finalize(self, self._core.close)
        self._adding = threading.Lock()
        self._added: Dict[bytes, int] = {}
        self._passive: Optional[threading.Thread] = None
        self.aio = Aio(self._core)

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<uccl_tcpx Endpoint, closed>" if self._core.closed else f"<uccl_tcpx Endpoint {self._core.metadata()}>"

    def close(self) -> None:
        """Closes the connections, ends the engine and lets go of registered buffers. Blocked calls of other threads raise UcclError."""
        self._core.close()

    @property
    def closed(self) -> bool:
        """Whether the endpoint is closed."""
        return self._core.closed

    # ---- connections ----

    def get_metadata(self) -> bytes:
        """Where this endpoint listens, for `add_remote_endpoint` and `parse_metadata` of peers: b"ADDRESS:PORT?GPU"."""
        return self._core.metadata().encode()

    @staticmethod
    def parse_metadata(metadata: Union[bytes, bytearray, str]) -> Tuple[str, int, str]:
        """Address, port and GPU of metadata, the arguments of `connect`. Other addresses of the peer follow the GPU, each behind a comma."""
        ip, gpu, port = c.create_string_buffer(256), c.create_string_buffer(512), c.c_int()
        library().check(library().parse_metadata(_bytes(metadata), ip, len(ip), c.byref(port), gpu, len(gpu)))
        return ip.value.decode(), port.value, gpu.value.decode()

    def connect(self, remote_ip_addr: str, remote_gpu_bdf: Union[str, int] = "", remote_port: int = -1) -> Tuple[bool, int]:
        """Connects to a peer, whose application need not call accept. Returns True and the connection's number.

        Raises: ConnectionLost, TimedOut (UCCL_TCPX_CONNECT_TIMEOUT_MS), UcclError."""
        return True, self._core.connect(remote_ip_addr, str(remote_gpu_bdf), remote_port)

    def add_remote_endpoint(self, metadata_bytes: Union[bytes, bytearray]) -> Tuple[bool, int]:
        """Connects to the endpoint of the metadata, unless an open connection to it was added before. Returns True and its number."""
        key = _bytes(metadata_bytes)
        with self._adding:
            known = self._added.get(key)
            if known is not None and self._core.is_up(known):
                return True, known
            ip, port, gpu = self.parse_metadata(key)
            self._added[key] = number = self._core.connect(ip, gpu, port)
        return True, number

    def remove_remote_endpoint(self, conn_id: int) -> bool:
        """Closes a connection. Its transfers fail. False if there is none of this number."""
        with self._adding:
            for key in [key for key, number in self._added.items() if number == conn_id]:
                del self._added[key]
        return self._core.disconnect(conn_id)

    def accept(self, timeout: Optional[float] = None) -> Tuple[bool, str, int, int]:
        """Waits for a connection that a peer opens. Returns True, the peer's address, its GPU (-1: none) and the connection's number.

        timeout: seconds; None: without limit.
        Raises: TimedOut, UcclError (also when another thread closes the endpoint)."""
        for limit in slices(deadline(timeout)):
            found = self._core.accept(limit)
            if found is not None:
                return True, *found
        raise timed_out("accept", timeout)

    def start_passive_accept(self) -> bool:
        """Accepts all connections in a thread, which closes those that peers have ended. Returns True."""
        with self._adding:
            if self._passive is None:
                self._passive = accept_passively(self._core)
        return True

    def conn_id_of_rank(self, rank: int) -> int:
        """2**64 - 1: this library knows no ranks."""
        return _UNKNOWN

    def is_connected(self, conn_id: int) -> bool:
        """Whether the connection is open."""
        return self._core.is_up(conn_id)

    # ---- memory ----

    def reg(
        self,
        ptr: Buffer,
        size: Optional[int] = None,
        floatType: FloatType = FloatType.kUndefined,
        *,
        access: int = ACCESS_REMOTE_READ | ACCESS_REMOTE_WRITE,
    ) -> Tuple[bool, int]:
        """Registers memory. Returns True and the region's number.

        ptr: a buffer, which is kept until `dereg` or `close`; or an address, whose memory the caller keeps.
        access: what peers may do. They may not write to a read-only buffer."""
        return True, self._register(memory_of(ptr, size), access)

    def regv(self, ptrs: Sequence[Buffer], sizes: Optional[Sequence[int]] = None) -> Tuple[bool, List[int]]:
        """Registers several; all or none. Returns True and the numbers of the regions."""
        _check_lengths(ptrs=ptrs, sizes=sizes)
        regions: List[int] = []
        try:
            for memory in [memory_of(*each) for each in zip(ptrs, _sizes(ptrs, sizes))]:
                regions.append(self._register(memory))
        except BaseException:
            for region in regions:
                self._core.deregister(region)
            raise
        return True, regions

    def _register(self, memory: Memory, access: int = ACCESS_REMOTE_READ | ACCESS_REMOTE_WRITE) -> int:
        if memory.readonly:
            access &= ~ACCESS_REMOTE_WRITE
        return self._core.register(memory, access)

    def dereg(self, mr_id: int) -> bool:
        """Deregisters a region and lets go of its buffer. Waits for its transfers. False if there is none of this number."""
        return self._core.deregister(mr_id)

    @contextlib.contextmanager
    def registered(self, buffer: Buffer, size: Optional[int] = None, **keywords: Any) -> Iterator[Region]:
        """A region for the time of a `with` block; arguments as for `reg`."""
        memory = memory_of(buffer, size)
        _, region = self.reg(buffer, size, **keywords)
        try:
            yield Region(region, memory.addr, memory.size, self._core.item(region, memory.addr, memory.size))
        finally:
            with contextlib.suppress(UcclError):  # the endpoint is closed
                self._core.deregister(region)

    def advertise(self, mr_id: int, ptr: Buffer, size: Optional[int] = None) -> Tuple[bool, bytes]:
        """Returns True and 64 bytes (a FIFO item) with which a peer can read and write the range. They are secret: every holder
        can access the whole region, within its access rights, until `dereg`."""
        memory = memory_of(ptr, size)
        return True, self._core.item(mr_id, memory.addr, memory.size)

    def advertisev(
        self, mr_id_v: Sequence[int], ptr_v: Sequence[Buffer], size_v: Optional[Sequence[int]] = None, num_iovs: Optional[int] = None
    ) -> Tuple[bool, List[bytes]]:
        """`advertise` for several ranges."""
        _check_lengths(num_iovs, mr_id_v=mr_id_v, ptr_v=ptr_v, size_v=size_v)
        return True, [self.advertise(*each)[1] for each in zip(mr_id_v, ptr_v, _sizes(ptr_v, size_v))]

    # ---- reads and writes ----

    def read(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int], meta: bytes) -> bool:
        """Reads the peer's memory that `meta` (from its `advertise`) describes into local registered memory. Returns True when done.

        Raises: UcclError; the destination is then undefined."""
        return self._finish(self.read_async(conn_id, mr_id, ptr, size, meta))

    def read_async(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int], meta: bytes) -> Tuple[bool, int]:
        """Starts a read. Returns True and the transfer's number, for `poll_async`, `wait` or `aio.wait`."""
        return True, self._core.one_sided(conn_id, False, _segments([mr_id], [ptr], [size], [meta]))

    def readv(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]],
        meta_blob_v: Sequence[bytes],
        num_iovs: Optional[int] = None,
    ) -> bool:
        """`read` of several ranges as one transfer."""
        return self._finish(self.readv_async(conn_id, mr_id_v, ptr_v, size_v, meta_blob_v, num_iovs))

    def readv_async(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]],
        meta_blob_v: Sequence[bytes],
        num_iovs: Optional[int] = None,
    ) -> Tuple[bool, int]:
        """`read_async` of several ranges as one transfer."""
        return True, self._core.one_sided(conn_id, False, _segments(mr_id_v, ptr_v, size_v, meta_blob_v, num_iovs))

    def write(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int], meta: bytes) -> bool:
        """Writes local registered memory to the peer's memory that `meta` describes. Returns True when every byte is in place there."""
        return self._finish(self.write_async(conn_id, mr_id, ptr, size, meta))

    def write_async(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int], meta: bytes) -> Tuple[bool, int]:
        """Starts a write; the source must not change until it has ended. Returns True and the transfer's number."""
        return True, self._core.one_sided(conn_id, True, _segments([mr_id], [ptr], [size], [meta]))

    def writev(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]],
        meta_blob_v: Sequence[bytes],
        num_iovs: Optional[int] = None,
    ) -> bool:
        """`write` of several ranges as one transfer."""
        return self._finish(self.writev_async(conn_id, mr_id_v, ptr_v, size_v, meta_blob_v, num_iovs))

    def writev_async(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]],
        meta_blob_v: Sequence[bytes],
        num_iovs: Optional[int] = None,
    ) -> Tuple[bool, int]:
        """`write_async` of several ranges as one transfer."""
        return True, self._core.one_sided(conn_id, True, _segments(mr_id_v, ptr_v, size_v, meta_blob_v, num_iovs))

    # ---- two-sided messages ----

    def send(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int] = None) -> bool:
        """Sends a message to the peer's matching `recv`. Returns True when the peer has every byte."""
        return self._finish(self.send_async(conn_id, mr_id, ptr, size))

    def send_async(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int] = None) -> Tuple[bool, int]:
        """Starts a send. Sends and the peer's receives match in the order of the calls."""
        memory = memory_of(ptr, size)
        return True, self._core.send(conn_id, mr_id, memory.addr, memory.size)

    def sendv(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        data_ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]] = None,
        num_iovs: Optional[int] = None,
    ) -> bool:
        """Sends a message from each buffer, in order."""
        return self._finish(self.sendv_async(conn_id, mr_id_v, data_ptr_v, size_v, num_iovs))

    def sendv_async(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        data_ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]] = None,
        num_iovs: Optional[int] = None,
    ) -> Tuple[bool, int]:
        """Starts a send of a message from each buffer, in order, under one number."""
        return True, self._core.together(self._core.send, conn_id, _ranges(mr_id_v, data_ptr_v, size_v, num_iovs))

    def recv(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int] = None) -> bool:
        """Receives a message of at most `size` bytes. Returns True when it is there. `recv_async` and `progress` tell its length."""
        return self._finish(self.recv_async(conn_id, mr_id, ptr, size))

    def recv_async(self, conn_id: int, mr_id: int, ptr: Buffer, size: Optional[int] = None) -> Tuple[bool, int]:
        """Starts a receive."""
        memory = memory_of(ptr, size)
        return True, self._core.receive(conn_id, mr_id, memory.addr, memory.size)

    def recvv(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        data_ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]] = None,
        num_iovs: Optional[int] = None,
    ) -> bool:
        """Receives a message into each buffer, in order."""
        return self._finish(self.recvv_async(conn_id, mr_id_v, data_ptr_v, size_v, num_iovs))

    def recvv_async(
        self,
        conn_id: int,
        mr_id_v: Sequence[int],
        data_ptr_v: Sequence[Buffer],
        size_v: Optional[Sequence[int]] = None,
        num_iovs: Optional[int] = None,
    ) -> Tuple[bool, int]:
        """Starts a receive into each buffer, in order, under one number."""
        return True, self._core.together(self._core.receive, conn_id, _ranges(mr_id_v, data_ptr_v, size_v, num_iovs))

    # ---- the end of transfers ----

    def poll_async(self, transfer_id: int) -> Tuple[bool, bool]:
        """Returns True and whether the transfer is done. Does not block.

        Raises: UcclError when it has failed."""
        done = self._core.poll(transfer_id).done
        if done:
            self._core.forget(transfer_id)
        return True, done

    def wait(self, transfer_id: int, timeout: Optional[float] = None) -> bool:
        """Blocks until the transfer is done, and returns True; False after `timeout` seconds.

        Raises: UcclError when it has failed."""
        done = self._core.wait(transfer_id, timeout)
        if done:
            self._core.forget(transfer_id)
        return done

    def progress(self, transfer_id: int) -> Progress:
        """Whether the transfer is done, the bytes moved, and its length: for a receive that of the message, once known."""
        return self._core.poll(transfer_id)

    def _finish(self, started: Tuple[bool, int]) -> bool:
        return self.wait(started[1])

    # ---- notifications ----

    def send_notif(self, conn_id: int, name: Union[bytes, str], message: Union[bytes, str] = b"") -> bool:
        """Sends a notification of up to 64 MiB. It arrives after the data of transfers that were done before this call."""
        self._core.notify(conn_id, _bytes(name), _bytes(message))
        return True

    def get_notifs(self) -> List[Notification]:
        """Takes the notifications that have arrived."""
        return list(iter(lambda: self._core.notification(None), None))

    def wait_notif(self, timeout: Optional[float] = None) -> Notification:
        """Takes the oldest notification, waiting for one for at most `timeout` seconds.

        Raises: TimedOut."""
        for limit in slices(deadline(timeout)):
            found = self._core.notification(limit)
            if found is not None:
                return found
        raise timed_out("wait_notif", timeout)

    # ---- descriptors: the interface that Ray uses ----

    def register_memory(self, tensor_list: Sequence[Buffer]) -> List[XferDesc]:
        """Registers tensors or other buffers, all or none, and returns a descriptor of each."""
        tensors = [memory_of(tensor) for tensor in tensor_list]
        _, regions = self.regv(list(tensor_list))
        return [self._describe(*each) for each in zip(regions, tensors)]

    def _describe(self, region: int, memory: Memory) -> XferDesc:
        described = XferDesc()
        described.addr, described.size, described.mr_id = memory.addr, memory.size, region
        described.rkeys = list(struct.unpack(f"<{_WORDS}I", self._core.item(region, memory.addr, memory.size)))
        described.lkeys = [0] * _WORDS
        return described

    def deregister_memory(self, desc_list: Sequence[XferDesc]) -> None:
        """Deregisters what `register_memory` registered."""
        for described in desc_list:
            if described.mr_id != _NO_REGION:
                self._core.deregister(described.mr_id)

    def get_serialized_descs(self, desc_list: Sequence[XferDesc]) -> bytes:
        """Descriptors as bytes, for the peer. They contain secrets: see `advertise`."""
        parts = [struct.pack("<Q", len(desc_list))]
        for one in desc_list:
            if len(one.lkeys) != len(one.rkeys):
                raise invalid("a descriptor needs as many lkeys as rkeys")
            keys = len(one.rkeys)
            parts.append(struct.pack(f"<QQQ{2 * keys}IQ", one.addr, one.size, keys, *one.lkeys, *one.rkeys, 0))
        return b"".join(parts)

    def deserialize_descs(self, serialized_bytes: Union[bytes, bytearray]) -> List[XferDesc]:
        """Descriptors that a peer serialized."""
        if not serialized_bytes:
            return []
        reader = _Reader(_bytes(serialized_bytes))
        return [reader.descriptor() for _ in range(reader.take("Q")[0])]

    def transfer(
        self, conn_id: int, op_name: str, local_desc_list: Sequence[XferDesc], remote_desc_list: Sequence[XferDesc]
    ) -> Tuple[bool, int]:
        """Starts a "write" to, or a "read" from, the peer's memory, pair by pair as one transfer; the local sizes count. Returns True
        and the transfer's number."""
        if len(local_desc_list) != len(remote_desc_list):
            raise invalid("Local and remote descriptors must have the same size")
        if op_name not in ("write", "read"):
            raise invalid(f"Invalid op_name: {op_name}")
        self._core.connection(conn_id)
        segments = [_pair(here, there) for here, there in zip(local_desc_list, remote_desc_list)]
        return True, self._core.one_sided(conn_id, op_name == "write", segments)

    # ---- UCCL's second interface for processes on one host ----

    def _refuse(self, *_arguments: Any, **_keywords: Any) -> Any:
        """Raises UcclError: `connect`, `read` and `write` move data between processes on one host without channels, where they can."""
        raise UcclError(UNSUPPORTED, "not needed and not offered: connect, read and write make direct transfers on one host")

    connect_local = accept_local = advertise_ipc = advertisev_ipc = _refuse
    read_ipc = read_ipc_async = readv_ipc = readv_ipc_async = _refuse
    write_ipc = write_ipc_async = writev_ipc = writev_ipc_async = _refuse

    # ---- other ----

    def fileno(self) -> int:
        """A new descriptor for an event loop; the caller closes it. It is readable after a notification has come, a transfer has ended, a
        connection has come or ended. Read 8 bytes from it, then look. Not needed for asyncio: see `aio`."""
        return self._core._event_fd()

    def paths(self, conn_id: int) -> List[Path]:
        """Which path has carried how many bytes of the connection, in both directions: by carrier (as in UCCL_TCPX_REQUIRE) and NIC. The
        difference of two calls is what the transfers between them took. Bytes of a transfer are counted when it has ended, at the latest."""
        return self._core.paths(conn_id)

    def transfer_path(self, transfer_id: int) -> TransferPath:
        """What carried a transfer: its carriers, as in `paths`, and this host's NICs. Also of a transfer that is done, while it is among the
        last 16,384 of its connection."""
        return self._core.transfer_path(transfer_id)

    def stats_text(self) -> str:
        """Statistics of the endpoint, its connections and their channels, for people."""
        return self._core.stats()


@contextlib.contextmanager
def _device(index: Optional[int]) -> Iterator[None]:
    """Makes a GPU the current device, with torch if the program uses it."""
    import sys

    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if index is None or cuda is None or not cuda.is_available() or index >= cuda.device_count():
        yield
        return
    with cuda.device(index):
        cuda.synchronize()  # the runtime creates its context only when it is needed
        yield


def _check_lengths(number: Optional[int] = None, **lists: Optional[Sequence[Any]]) -> None:
    lengths = {len(each) for each in lists.values() if each is not None} | ({number} if number is not None else set())
    if len(lengths) > 1:
        names = " and ".join(lists)
        # As UCCL says it: programs may look for the sentence.
        text = f"{names} must match" if number is None else f"All input vectors/lists must have length num_iovs ({number}): {names} must match it"
        raise invalid(text)


def _sizes(buffers: Sequence[Buffer], sizes: Optional[Sequence[Optional[int]]]) -> Sequence[Optional[int]]:
    return [None] * len(buffers) if sizes is None else sizes


def _ranges(
    regions: Sequence[int], buffers: Sequence[Buffer], sizes: Optional[Sequence[Optional[int]]], number: Optional[int]
) -> List[Tuple[int, int, int]]:
    _check_lengths(number, mr_id_v=regions, ptr_v=buffers, size_v=sizes)
    memories = [memory_of(*each) for each in zip(buffers, _sizes(buffers, sizes))]
    return [(region, memory.addr, memory.size) for region, memory in zip(regions, memories)]


def _segments(
    regions: Sequence[int],
    buffers: Sequence[Buffer],
    sizes: Optional[Sequence[Optional[int]]],
    items: Sequence[bytes],
    number: Optional[int] = None,
) -> List[Segment]:
    _check_lengths(number, mr_id_v=regions, meta_blob_v=items)
    ranges = _ranges(regions, buffers, sizes, number)
    return [Segment(*each, _bytes(item)) for each, item in zip(ranges, items)]


def _pair(here: XferDesc, there: XferDesc) -> Segment:
    if here.mr_id == _NO_REGION:
        raise invalid("a local descriptor whose memory is not registered here")
    if len(there.rkeys) != _WORDS:
        raise invalid(f"a remote descriptor has {len(there.rkeys)} rkeys and not {_WORDS}: it is not of this library")
    if here.size > there.size:
        raise invalid(f"a local descriptor of {here.size} bytes with a remote one of {there.size}")
    item = struct.pack("<QI", there.addr, min(there.size, 0xFFFFFFFF)) + struct.pack(f"<{_WORDS}I", *there.rkeys)[12:]
    return Segment(here.mr_id, here.addr, here.size, item)


class _Reader:
    """Reads serialized descriptors."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, form: str) -> Tuple[Any, ...]:
        length = struct.calcsize("<" + form)
        if len(self._data) - self._at < length:
            raise invalid("Invalid serialized XferDesc data")
        values = struct.unpack_from("<" + form, self._data, self._at)
        self._at += length
        return values

    def keys(self, number: int) -> List[int]:
        if number > len(self._data) // 4:
            raise invalid("Invalid serialized XferDesc data")
        return list(self.take(f"{number}I"))

    def descriptor(self) -> XferDesc:
        described = XferDesc()
        described.addr, described.size, number = self.take("QQQ")
        described.lkeys, described.rkeys = self.keys(number), self.keys(number)
        (extra,) = self.take("Q")
        self.take(f"{min(extra, len(self._data) + 1)}x")
        return described


def _bytes(text: Union[bytes, bytearray, memoryview, str]) -> bytes:
    try:
        return text.encode() if isinstance(text, str) else bytes(memoryview(text))
    except TypeError:
        raise invalid(f"{type(text).__name__} in the place of bytes") from None
