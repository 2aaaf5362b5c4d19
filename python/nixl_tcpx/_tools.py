"""The programs that come with the library."""

import os
import pathlib
import sys


def _become(name, arguments):
    path = str(pathlib.Path(__file__).parent / "bin" / name)
    sys.stdout.flush()
    os.execv(path, [name, *arguments])


def info():
    """tcpx-info: what the library sees on this host."""
    _become("tcpx-info", sys.argv[1:])


def perf():
    """tcpx-perf: measures and verifies."""
    _become("tcpx-perf", sys.argv[1:])


def top():
    """tcpx-top: what the connections of a running process do."""
    _become("tcpx-top", sys.argv[1:])


def path(name):
    """Where a program is."""
    return str(pathlib.Path(__file__).parent / "bin" / name)
