"""Event loops that wait for something to happen at an engine. Knows nothing about what that is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import Callable, Dict, Optional, Set, TypeVar

T = TypeVar("T")


class Events:
    """Loops of several threads may wait. Each watches a descriptor of its own; all are duplicates of one eventfd."""

    def __init__(self, open_fd: Callable[[], int]) -> None:
        self._open_fd = open_fd
        # A finalizer that closes may run in a thread that holds it.
        self._lock = threading.RLock()
        self._loops: Dict[asyncio.AbstractEventLoop, int] = {}
        self._waiting: "Set[asyncio.Future[None]]" = set()
        self._closed = False

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if loop in self._loops or self._closed:
                return
            ended = [other for other in self._loops if other.is_closed()]
            stale = [self._loops.pop(other) for other in ended]
            fd = self._loops[loop] = self._open_fd()
        for other in stale:
            os.close(other)
        loop.add_reader(fd, self._ready, fd)

    def _ready(self, fd: int) -> None:
        # The read resets the descriptors of all loops, so it wakes all of them.
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 8)
        self.wake()

    def wake(self) -> None:
        """Wakes all tasks that wait; each looks again."""
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for future in waiting:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                future.get_loop().call_soon_threadsafe(_finish, future)

    async def until(self, look: Callable[[], Optional[T]]) -> T:
        """What `look` returns, once it returns something. It is called in the loop's thread and must not block."""
        loop = asyncio.get_running_loop()
        self._attach(loop)
        while True:
            future = loop.create_future()
            with self._lock:
                self._waiting.add(future)
            try:
                # An event after this look finds the future.
                found = look()
                if found is not None:
                    return found
                await future
            finally:
                with self._lock:
                    self._waiting.discard(future)

    def close(self) -> None:
        """Ends the descriptors, and wakes all tasks."""
        with self._lock:
            loops, self._loops, self._closed = self._loops, {}, True
        for loop, fd in loops.items():
            try:
                loop.call_soon_threadsafe(_detach, loop, fd)
            except RuntimeError:  # it is closed
                os.close(fd)
        self.wake()


def _finish(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _detach(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    loop.remove_reader(fd)
    os.close(fd)
