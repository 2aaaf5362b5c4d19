"""A program of NIXL as others write it: it knows UCX and nothing of TCPX. One process writes into the other's memory and reads it back.

    ucx_program.py [--size BYTES] [--backend NAME] [--params JSON] [--fork]

It prints a line of JSON, and ends with its input.
"""

import argparse
import base64
import ctypes
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time

SECONDS = 30


def api():
    return importlib.import_module(os.environ.get("NIXL_PACKAGE", "nixl") + "._api")


class Side:
    """An agent with a buffer."""

    def __init__(self, name, options):
        nixl = api()
        if options.params:
            self.agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=[]))
            # As programs do that set one of UCX's parameters.
            self.params = dict(self.agent.get_plugin_params(options.backend or "UCX"))
            self.agent.create_backend(options.backend or "UCX", {**self.params, **json.loads(options.params)})
        elif options.backend:
            self.agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=[options.backend]))
        else:
            self.agent = nixl.nixl_agent(name)
        self.name, self.size = name, options.size
        self.memory = ctypes.create_string_buffer(options.size)
        self.agent.register_memory([(ctypes.addressof(self.memory), self.size, 0, "")], "DRAM")

    def blocks(self, address):
        return self.agent.get_xfer_descs([(address, self.size, 0)], "DRAM")

    def move(self, operation, address, peer, message):
        handle = self.agent.initialize_xfer(operation, self.blocks(ctypes.addressof(self.memory)), self.blocks(address), peer, message)
        state, deadline = self.agent.transfer(handle), time.monotonic() + SECONDS
        while state == "PROC" and time.monotonic() < deadline:
            state = self.agent.check_xfer_state(handle)
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise SystemExit(f"{operation} ended with {state}")

    def wait_for(self, message):
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for messages in self.agent.get_new_notifs().values():
                if message in messages:
                    return
        raise SystemExit(f"no notification {message!r}")


def target(options, lines_in, lines_out):
    """The process whose memory the other one uses."""
    side = Side("target", options)
    hello = {"metadata": base64.b64encode(side.agent.get_agent_metadata()).decode(), "address": ctypes.addressof(side.memory)}
    print(json.dumps(hello), file=lines_out, flush=True)
    side.wait_for(b"written")
    print(hashlib.sha256(side.memory.raw).hexdigest(), file=lines_out, flush=True)
    lines_in.read()


def initiator(options, lines_in, lines_out):
    side = Side("initiator", options)
    hello = json.loads(lines_in.readline())
    side.agent.add_remote_agent(base64.b64decode(hello["metadata"]))
    pattern = os.urandom(side.size)
    side.memory.raw = pattern
    side.move("WRITE", hello["address"], "target", b"written")
    arrived = lines_in.readline().strip() == hashlib.sha256(pattern).hexdigest()
    ctypes.memset(side.memory, 0, side.size)
    side.move("READ", hello["address"], "target", b"")
    result = {"written": arrived, "read": side.memory.raw == pattern, "plugins": side.agent.get_plugin_list(), "backends": list(side.agent.backends)}
    print(json.dumps({**result, "params": getattr(side, "params", None)}), flush=True)
    sys.stdin.read()
    lines_out.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1 << 20)
    parser.add_argument("--backend")
    parser.add_argument("--params")
    parser.add_argument("--fork", action="store_true", help="the other process is a fork, not a program")
    parser.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        # What libraries print must not come between.
        lines_out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        target(options, sys.stdin, lines_out)
    elif options.fork:
        (child_in, lines_out), (lines_in, child_out) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(lines_out)
            target(options, os.fdopen(child_in), os.fdopen(child_out, "w"))
            return
        os.close(child_in)
        initiator(options, os.fdopen(lines_in), os.fdopen(lines_out, "w"))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("the fork failed")
    else:
        child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        initiator(options, child.stdout, child.stdin)
        if child.wait(SECONDS) != 0:
            raise SystemExit("the other process failed")


main()
