"""The exceptions of this package. Each carries the library's status number and text, and is a RuntimeError, as UCCL's are."""

from __future__ import annotations

from typing import Tuple

OK, IN_PROGRESS = 0, 1
INVALID_ARGUMENT, NOT_FOUND, RESOURCE, UNSUPPORTED, CANCELED = -1, -2, -3, -4, -5
TIMED_OUT, UNREACHABLE, REMOTE_DISCONNECT = -10, -11, -12


class UcclError(RuntimeError):
    """A call or a transfer failed. `status` is a UCCL_ERR_* number of uccl_engine.h, `text` the cause."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text

    def __str__(self) -> str:
        return f"{self.text} (status {self.status})"

    def __reduce__(self) -> Tuple[object, ...]:
        return type(self), (self.status, self.text)


class InvalidArgument(UcclError, ValueError):
    """An argument is out of range, malformed, or outside its region."""


class TimedOut(UcclError, TimeoutError):
    """A deadline passed."""


class ConnectionLost(UcclError, ConnectionError):
    """The peer cannot be reached, or the connection to it is lost."""


_CLASSES = {INVALID_ARGUMENT: InvalidArgument, TIMED_OUT: TimedOut, UNREACHABLE: ConnectionLost, REMOTE_DISCONNECT: ConnectionLost}


def error(status: int, text: str) -> UcclError:
    """The exception for a status."""
    return _CLASSES.get(status, UcclError)(status, text)


def invalid(text: str) -> UcclError:
    """The exception for an argument that this package refuses itself."""
    return InvalidArgument(INVALID_ARGUMENT, text)
