"""A thread that accepts the connections of an endpoint on which no program calls accept."""

from __future__ import annotations

import threading
import time
import weakref
from typing import List

from ._core import Core
from .errors import UcclError

# Between two looks for connections that their peers have ended.
LOOK_MS = 500


def accept_passively(core: Core) -> threading.Thread:
    """Starts the thread. It ends with the endpoint."""
    thread = threading.Thread(target=_run, args=(weakref.ref(core),), name="uccl-passive-accept", daemon=True)
    thread.start()
    return thread


def _run(reference: "weakref.ref[Core]") -> None:
    held: List[int] = []
    while True:
        core = reference()
        if core is None or not _round(core, held):
            return
        del core


def _round(core: Core, held: List[int]) -> bool:
    try:
        found = core.accept(LOOK_MS)
        if found is not None:
            held.append(found[2])
        for number in [number for number in held if not core.is_up(number)]:
            held.remove(number)
            core.disconnect(number)
    except UcclError:
        if core.closed:
            return False
        time.sleep(LOOK_MS / 1000)
    return True
