"""The other process of the tests: an endpoint that does what the test asks over a pipe. Also a runner for cases."""

import contextlib
import faulthandler
import functools
import hashlib
import multiprocessing
import os
import sys
import time
import traceback

from uccl_tcpx import p2p

LIMIT = 30


class Skip(Exception):
    """Why a case cannot run here."""


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@functools.lru_cache(maxsize=64)
def pattern(seed, size):
    """Bytes that depend on their offset, so that a misplaced block is detected."""
    block = bytes((seed + i * 131 + (i >> 8) * 17) % 256 for i in range(min(size, 65521)))
    return (block * (size // len(block) + 1))[:size] if size else b""


def raises(kind, words, call, *arguments, **keywords):
    """The exception that the call raises, whose text contains the words."""
    try:
        result = call(*arguments, **keywords)
    except kind as e:
        assert all(word in str(e) for word in words.split("|")), f"{type(e).__name__}: {e}"
        return e
    raise AssertionError(f"{getattr(call, '__name__', call)} returned {result!r} and did not raise {kind.__name__}")


class Other:
    """What runs in the other process; a new one after each `renew`."""

    def __init__(self, options=None):
        self.endpoint = p2p.Endpoint(options=options or {})
        self.buffers, self.transfers = [], {}

    def metadata(self):
        return self.endpoint.get_metadata()

    def offer(self, size, seed=None, **keywords):
        """A registered buffer; returns its FIFO item."""
        self.buffers.append(bytearray(size) if seed is None else bytearray(pattern(seed, size)))
        _, region = self.endpoint.reg(self.buffers[-1], **keywords)
        return self.endpoint.advertise(region, self.buffers[-1])[1], region

    def describe(self, *sizes):
        """Descriptors of new buffers, serialized."""
        new = [bytearray(size) for size in sizes]
        self.buffers.extend(new)
        return self.endpoint.get_serialized_descs(self.endpoint.register_memory(new))

    def content(self, number=-1):
        return bytes(self.buffers[number])

    def address(self, number=-1):
        """Address and size of a buffer."""
        memory = p2p.memory_of(self.buffers[number])
        return memory.addr, memory.size

    def digest(self, number=-1):
        return hashlib.sha256(self.buffers[number]).digest()

    def call(self, name, *arguments):
        return getattr(self.endpoint, name)(*arguments)

    def send(self, conn, data):
        buffer = bytearray(data or b"\0")
        _, region = self.endpoint.reg(buffer)
        self.buffers.append(buffer)
        return self.endpoint.send_async(conn, region, buffer, len(data))[1]

    def receive(self, conn, size):
        buffer = bytearray(size)
        _, region = self.endpoint.reg(buffer)
        self.buffers.append(buffer)
        transfer = self.endpoint.recv_async(conn, region, buffer)[1]
        assert self.endpoint.wait(transfer, LIMIT)
        return bytes(buffer[: self.endpoint.progress(transfer).total])


def serve(pipe):
    other = None
    while True:
        name, arguments, keywords = pipe.recv()
        if name == "exit":
            return
        try:
            if name == "renew":
                if other:
                    other.endpoint.close()
                other = Other(*arguments)
                pipe.send((True, None))
                continue
            pipe.send((True, getattr(other, name)(*arguments, **keywords)))
        except Exception as e:
            pipe.send((False, e))


class Peer:
    """The other process, as the test sees it: methods of `Other` run there."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there,), daemon=True)
        self.process.start()
        there.close()

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            self.begin(name, *arguments, **keywords)
            return self.end()

        return call

    def begin(self, name, *arguments, **keywords):
        self.pipe.send((name, arguments, keywords))

    def end(self):
        assert self.pipe.poll(LIMIT), "the other process does not answer"
        well, result = self.pipe.recv()
        if not well:
            raise result
        return result

    def kill(self):
        self.process.kill()
        self.process.join()


SHARED = []


@contextlib.contextmanager
def pair(options=None, connected=True):
    """(endpoint here, other process, connection from here to there)"""
    if not SHARED:
        SHARED.append(Peer())
    SHARED[0].renew(options)
    with p2p.Endpoint(options=options or {}) as here:
        yield here, SHARED[0], here.add_remote_endpoint(SHARED[0].metadata())[1] if connected else None


def main():
    words = sys.argv[1:]
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    for name, run in CASES.items():
        if words and not any(word in name for word in words):
            continue
        begun = time.monotonic()
        # A case that hangs ends the program and shows where.
        faulthandler.dump_traceback_later(4 * LIMIT, exit=True)
        try:
            run()
            outcome, why = "passed", ""
        except Skip as e:
            outcome, why = "skipped", f": {e}"
        except Exception:
            outcome, why = "failed", f"\n{traceback.format_exc()}"
        outcomes[outcome] += 1
        print(f"{outcome:<8} {name} ({time.monotonic() - begun:.2f} s){why}", flush=True)
        if outcome == "failed" and SHARED:
            SHARED.pop().kill()
    faulthandler.cancel_dump_traceback_later()
    print(", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()), flush=True)
    if SHARED:
        SHARED[0].begin("exit")
    sys.stdout.flush()
    return 1 if outcomes["failed"] or not outcomes["passed"] else 0


def descriptors():
    return len(os.listdir("/proc/self/fd"))
