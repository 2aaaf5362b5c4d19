"""Finds out whether NIXL moves data over TCPX here, step by step, and says at the first step that fails what to do."""

import ctypes
import importlib
import os
import subprocess
import sys
import time

from . import _find
from ._version import __version__

SIZE = 1 << 20
SECONDS = 30


class Trouble(Exception):
    """What is wrong, and what to do about it."""


def _say(step, text):
    print(f"{step:<10} {text}", flush=True)


def _versions():
    nixl = _find.find_nixl()
    if nixl is None:
        raise Trouble("NIXL is not installed in this environment: pip install nixl")
    _say("nixl", f"{nixl.package} {nixl.version}, plugins in {nixl.plugins}")
    if not _find.supported(nixl.version):
        oldest, beyond = (".".join(map(str, v)) for v in (_find.OLDEST, _find.BEYOND))
        raise Trouble(f"NIXL {nixl.version} is not between {oldest} and {beyond}: this plugin ({__version__}) was not made for it")
    return nixl


def _plugin():
    path = _find.plugin_path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise Trouble(f"{path} cannot be loaded: {error}") from error
    if not hasattr(library, "nixl_plugin_init"):
        raise Trouble(f"{path} is not a NIXL plugin: install the wheel again")
    _say("plugin", f"{path}, version {__version__}")


def _directory(nixl):
    directory = _find.plugin_dir(nixl.package)
    _say("directory", directory)
    current = os.environ.get("NIXL_PLUGIN_DIR")
    if current and not os.path.exists(os.path.join(current, _find.PLUGIN)):
        raise Trouble(f"NIXL_PLUGIN_DIR is {current}, which has no {_find.PLUGIN}: export NIXL_PLUGIN_DIR={directory}")
    if not current:
        _say("", f"NIXL_PLUGIN_DIR is not set; programs need: export NIXL_PLUGIN_DIR={directory}")
        os.environ["NIXL_PLUGIN_DIR"] = directory


def _finish(agent, handle, what):
    deadline = time.monotonic() + SECONDS
    state = agent.transfer(handle)
    while state == "PROC":
        if time.monotonic() > deadline:
            raise Trouble(f"{what} did not end within {SECONDS} s: look at the lines on standard error")
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise Trouble(f"{what} ended with {state}: look at the lines on standard error")


def _move(nixl):
    api = importlib.import_module(nixl.package + "._api")
    config = api.nixl_agent_config(backends=["TCPX"])
    one, two = api.nixl_agent("nixl-tcpx-one", config), api.nixl_agent("nixl-tcpx-two", config)
    plugins = one.get_plugin_list()
    _say("backends", " ".join(sorted(plugins)))
    mine, theirs = (ctypes.create_string_buffer(SIZE) for _ in range(2))
    ctypes.memset(mine, 7, SIZE)
    addresses = [ctypes.addressof(buffer) for buffer in (mine, theirs)]
    for agent, address in zip((one, two), addresses):
        agent.register_memory([(address, SIZE, 0, "")], "DRAM")
    one.add_remote_agent(two.get_agent_metadata())
    local, remote = (one.get_xfer_descs([(address, SIZE, 0)], "DRAM") for address in addresses)
    _finish(one, one.initialize_xfer("WRITE", local, remote, "nixl-tcpx-two", b""), "a WRITE")
    if theirs.raw != mine.raw:
        raise Trouble("a WRITE was reported as done and moved other bytes: please report this")
    ctypes.memset(theirs, 9, SIZE)
    _finish(one, one.initialize_xfer("READ", local, remote, "nixl-tcpx-two", b""), "a READ")
    if theirs.raw != mine.raw:
        raise Trouble("a READ was reported as done and moved other bytes: please report this")
    one.send_notif("nixl-tcpx-two", b"hello")
    deadline = time.monotonic() + SECONDS
    while not two.get_new_notifs():
        if time.monotonic() > deadline:
            raise Trouble("a notification did not arrive")
    _say("moved", f"{SIZE} bytes by WRITE, {SIZE} by READ, and a notification, all right")


def doctor():
    """0 when all is well."""
    try:
        nixl = _versions()
        _plugin()
        _directory(nixl)
        _move(nixl)
    except Trouble as trouble:
        _say("TROUBLE", str(trouble))
        return 1
    except Exception as error:
        _say("TROUBLE", f"{type(error).__name__}: {error}")
        return 1
    print("NIXL moves data over TCPX on this host.")
    return 0


def info(arguments):
    """Versions and paths, and then what tcpx-info says. Its exit status."""
    from ._tools import path

    nixl = _find.find_nixl()
    if "--json" not in arguments:
        _say("nixl-tcpx", f"{__version__}, {_find.plugin_path()}")
        _say("nixl", f"{nixl.package} {nixl.version}, {nixl.plugins}" if nixl else "not installed")
        if not _find.supported():
            _say("WARNING", "this plugin was not tested with this NIXL")
        _say("directory", _find.plugin_dir())
        _say("in use", os.environ.get("NIXL_PLUGIN_DIR", "NIXL_PLUGIN_DIR is not set: only NIXL's own back ends are found"))
        sys.stdout.flush()
    return subprocess.call([path("tcpx-info"), *arguments])
