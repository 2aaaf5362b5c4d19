"""libuccl_p2p from Python, without NIXL: `uccl_tcpx.p2p` has the interface of UCCL's `uccl.p2p`.

    from uccl_tcpx import p2p        # instead of: from uccl import p2p

It moves host and GPU memory between machines without RDMA, over GPUDirect-TCPX where Google's plugin is installed and over ordinary TCP
elsewhere. docs/python.md explains it.
"""

from . import p2p
from ._version import __version__
from .errors import ConnectionLost, InvalidArgument, TimedOut, UcclError
from .p2p import Endpoint, Notification, Path, Progress, Region, TransferPath, XferDesc

__all__ = [
    "ConnectionLost",
    "Endpoint",
    "InvalidArgument",
    "Notification",
    "Path",
    "Progress",
    "Region",
    "TimedOut",
    "TransferPath",
    "UcclError",
    "XferDesc",
    "__version__",
    "library_path",
    "library_version",
    "p2p",
]


def library_path() -> str:
    """The file of the library that this package loads: LIBUCCL_P2P, its own, or the one that the loader finds."""
    from ._library import path

    return path()


def library_version() -> str:
    """The version of the library."""
    from ._library import library

    return library().release
