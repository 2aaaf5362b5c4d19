"""Loads libuccl_p2p.so and declares the functions of its C ABI that this package uses. Knows nothing about endpoints."""

from __future__ import annotations

import ctypes as c
import os
import pathlib
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

from .errors import UNSUPPORTED, UcclError, error

FIFO_SIZE = 64
ACCESS_REMOTE_READ, ACCESS_REMOTE_WRITE = 1, 2


class FifoItem(c.Structure):
    """Access to a range of a peer's region."""

    _fields_ = [
        ("addr", c.c_uint64),
        ("size", c.c_uint32),
        ("rkey", c.c_uint32),
        ("nmsgs", c.c_uint32),
        ("rid", c.c_uint32),
        ("idx", c.c_uint64),
        ("padding", c.c_char * 32),
    ]


class Option(c.Structure):
    """A setting of an engine."""

    _fields_ = [("name", c.c_char_p), ("value", c.c_char_p)]


class TransferInfo(c.Structure):
    """The state of a transfer."""

    _fields_ = [("status", c.c_int32), ("reserved", c.c_uint32), ("bytes_total", c.c_uint64), ("bytes_done", c.c_uint64)]


class ConnectionStats(c.Structure):
    """The first members of a connection's statistics: the library fills as much as `size` says."""

    _fields_ = [("size", c.c_size_t)] + [
        (name, c.c_uint64)
        for name in ("id", "up", "age_ms", "silent_ms", "channels", "transfers_in_flight", "backlog_bytes")
        + ("sent_bytes", "sent_chunks", "received_bytes", "received_chunks", "eager_sent_bytes", "eager_received_bytes")
    ]


class ChannelStats(c.Structure):
    """The statistics of a channel."""

    _fields_ = [
        ("size", c.c_size_t),
        ("sent_bytes", c.c_uint64),
        ("sent_chunks", c.c_uint64),
        ("received_bytes", c.c_uint64),
        ("received_chunks", c.c_uint64),
        ("counters", c.c_uint64 * 15),
        ("nic", c.c_char * 32),
        ("pack_us", c.c_uint64),
        ("unpack_us", c.c_uint64),
        ("lost", c.c_uint64),
        ("nvlink_bytes", c.c_uint64),
        ("plugin", c.c_char * 32),
        ("carrier", c.c_char * 16),
    ]


class XferPath(c.Structure):
    _fields_ = [("size", c.c_size_t), ("channels", c.c_uint64), ("carriers", c.c_char * 64), ("nics", c.c_char * 128)]


_handle, _size, _status, _text, _id = c.c_void_p, c.c_size_t, c.c_int, c.c_char_p, c.c_uint64
_sizes, _ids, _items, _addresses = c.POINTER(_size), c.POINTER(_id), c.POINTER(FifoItem), c.POINTER(c.c_void_p)
_vector = [_handle, _ids, _addresses, _sizes, _items, c.c_int, _ids]

_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "create_with": (_status, [c.POINTER(Option), _size, c.POINTER(_handle)]),
    "destroy": (None, [_handle]),
    "event_fd": (_status, [_handle, c.POINTER(c.c_int)]),
    "metadata_into": (_status, [_handle, _text, _size, _sizes]),
    "parse_metadata": (_status, [_text, _text, _size, c.POINTER(c.c_int), _text, _size]),
    "connect": (_handle, [_handle, _text, _text, c.c_int, c.c_bool]),
    "accept_for": (_status, [_handle, c.c_int64, _text, _size, c.POINTER(c.c_int), c.POINTER(_handle)]),
    "stop_accept": (None, [_handle]),
    "conn_destroy": (None, [_handle]),
    "conn_status": (_status, [_handle]),
    "conn_is_local": (c.c_bool, [_handle]),
    "reg_with": (_status, [_handle, _size, _size, c.c_uint32, _ids]),
    "mr_destroy": (None, [_handle, _id]),
    "prepare_fifo": (_status, [_handle, _id, c.c_void_p, _size, _text]),
    "read": (_status, [_handle, _id, c.c_void_p, _size, FifoItem, _ids]),
    "write": (_status, [_handle, _id, c.c_void_p, _size, FifoItem, _ids]),
    "read_vector": (_status, _vector),
    "write_vector": (_status, _vector),
    "send": (_status, [_handle, _id, c.c_void_p, _size, _ids]),
    "recv_async": (_status, [_handle, _id, c.c_void_p, _size, _ids]),
    "poll": (_status, [_handle, _id, c.POINTER(TransferInfo)]),
    "wait": (_status, [_handle, _id, c.c_int64]),
    "send_notif_bytes": (_status, [_handle, _text, _size, _text, _size]),
    "notif_next": (_status, [_handle, c.POINTER(_handle)]),
    "notif_wait": (_status, [_handle, c.c_int64, c.POINTER(_handle)]),
    "notif_name": (c.c_void_p, [_handle, _sizes]),
    "notif_msg": (c.c_void_p, [_handle, _sizes]),
    "notif_free": (None, [_handle]),
    "conn_stats": (_status, [_handle, c.POINTER(ConnectionStats)]),
    "channel_stats": (_status, [_handle, _size, c.POINTER(ChannelStats)]),
    "xfer_path": (_status, [_handle, _id, c.POINTER(XferPath)]),
    "stats_text": (_status, [_handle, _text, _size, _sizes]),
    "strerror": (_text, [c.c_int32]),
    "last_error": (_text, []),
    "last_status": (_status, []),
    "version": (_text, []),
}


class Library:
    """The functions, without their prefix. A call releases the interpreter's lock while it runs."""

    def __init__(self, path: str) -> None:
        try:
            dll = c.CDLL(path)
            self.path: str = path
            self.release: str = self._declare(dll, "version")().decode()
        except (OSError, AttributeError) as e:
            raise ImportError(f"{path} cannot be loaded: {e}. LIBUCCL_P2P names another libuccl_p2p.so") from e
        for name in _PROTOTYPES:
            setattr(self, name, self._declare(dll, name))

    def _declare(self, dll: c.CDLL, name: str) -> Callable[..., Any]:
        try:
            function: Any = getattr(dll, "uccl_engine_" + name)
        except AttributeError:
            if name == "version":
                raise
            return self._missing(name)
        function.restype, function.argtypes = _PROTOTYPES[name]
        declared: Callable[..., Any] = function
        return declared

    def _missing(self, name: str) -> Callable[..., Any]:
        def refuse(*_arguments: object) -> None:
            raise UcclError(UNSUPPORTED, f"{self.path}, version {self.release}, has no uccl_engine_{name}: it is older than this package")

        return refuse

    def failure(self, status: Optional[int] = None) -> UcclError:
        """The exception for the last failed call of this thread."""
        status = self.last_status() if status is None else status
        text = self.last_error().decode(errors="replace") or self.strerror(status).decode()
        return error(status, text)

    def check(self, status: int) -> int:
        """Raises where the status is an error."""
        if status < 0:
            raise self.failure(status)
        return status

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)


def path() -> str:
    """The library's file: LIBUCCL_P2P, the one in this package, or the one that the loader finds."""
    chosen = os.environ.get("LIBUCCL_P2P")
    if chosen:
        return chosen
    own = pathlib.Path(__file__).parent / "lib" / "libuccl_p2p.so.0"
    return str(own) if own.exists() else own.name


_loading = threading.Lock()
_loaded: Optional[Library] = None


def library() -> Library:
    """The library, loaded at the first call."""
    global _loaded
    with _loading:
        if _loaded is None:
            _loaded = Library(path())
        return _loaded
