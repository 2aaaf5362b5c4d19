"""Shared by the NIXL tests: an agent with buffers, the same in another process, and a runner that gives every case its own process."""

import argparse
import ctypes
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def nixl_api():
    """The Python API of the NIXL wheel; NIXL_PACKAGE selects one (nixl_cu12, nixl_cu13) if several are installed."""
    return importlib.import_module(os.environ.get("NIXL_PACKAGE", "nixl") + "._api")


def pattern(seed, size):
    """Bytes that depend on their offset, so that a misplaced block is detected."""
    return np.random.Generator(np.random.SFC64(seed)).integers(0, 256, size, dtype=np.uint8)


class HostBuffer:
    """Host memory; `kind` VRAM is for engines that emulate a device in host memory."""

    def __init__(self, size, kind="DRAM", device=0):
        self.array = np.zeros(size, dtype=np.uint8)
        self.address, self.size, self.kind, self.device = self.array.ctypes.data, size, kind, 0

    def write(self, offset, data):
        self.array[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def read(self, offset, size):
        return self.array[offset : offset + size].copy()


class GpuBuffer:
    """Memory of a CUDA device, through torch."""

    def __init__(self, size, kind="VRAM", device=0):
        import torch

        self.torch = torch
        self.tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize(device)
        self.address, self.size, self.kind, self.device = self.tensor.data_ptr(), size, "VRAM", device

    def write(self, offset, data):
        source = self.torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        self.tensor[offset : offset + len(data)].copy_(source)
        # NIXL moves the memory's content at the time of the post; it knows nothing of streams.
        self.torch.cuda.synchronize(self.device)

    def read(self, offset, size):
        return self.tensor[offset : offset + size].cpu().numpy()


class Node:
    """An agent with named buffers. Arguments and results can be pickled, so that it works the same through a pipe."""

    def __init__(self, name, backend="TCPX", params=None, buffers="host", device=0, config=None):
        api = nixl_api()
        self.name, self.backend, self.buffer_kind, self.device = name, backend, buffers, device
        if buffers == "gpu":
            import torch

            torch.cuda.set_device(device)
        self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=[] if params is not None else [backend], **(config or {})))
        if params is not None:
            self.agent.create_backend(backend, params)
        self.buffers, self.registrations, self.requests, self.notes = {}, {}, {}, []

    def allocate(self, key, size, seed=None, kind=None):
        kind = kind or self.buffer_kind
        if kind == "gpu":
            buffer = GpuBuffer(size, device=self.device)
        else:
            buffer = HostBuffer(size, "VRAM" if kind == "emulated" else "DRAM")
        if seed is not None:
            buffer.write(0, pattern(seed, size))
        self.buffers[key] = buffer
        self.registrations[key] = self.agent.register_memory([(buffer.address, size, buffer.device, "")], buffer.kind)
        return buffer.address, buffer.device

    def deregister(self, key):
        self.agent.deregister_memory(self.registrations.pop(key))

    def fill(self, key, seed, size=None):
        self.buffers[key].write(0, pattern(seed, size or self.buffers[key].size))

    def set(self, key, offset, data):
        self.buffers[key].write(offset, data)

    def get(self, key, offset, size):
        return self.buffers[key].read(offset, size).tobytes()

    def matches(self, key, seed, offset=0, source=0, size=None):
        """Whether [offset, offset + size) of the buffer is the pattern's [source, source + size)."""
        size = self.buffers[key].size - offset if size is None else size
        expected, step = pattern(seed, source + size)[source:], 16 << 20  # in pieces: cases with large buffers run side by side
        return all(np.array_equal(self.buffers[key].read(offset + at, min(step, size - at)), expected[at : at + step]) for at in range(0, size, step))

    def metadata(self):
        return self.agent.get_agent_metadata()

    def connect(self, metadata):
        name = self.agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else name

    def forget(self, name):
        self.agent.remove_remote_agent(name)

    def local(self, key, blocks):
        buffer = self.buffers[key]
        return [(buffer.address + offset, size, buffer.device) for offset, size in blocks]

    def prepare(self, operation, local, remote, agent, message=b"", kinds=None):
        mine, theirs = kinds or ("VRAM" if self.buffer_kind != "host" else "DRAM",) * 2
        return self.agent.initialize_xfer(
            operation, self.agent.get_xfer_descs(local, mine), self.agent.get_xfer_descs(remote, theirs), agent, message
        )

    def finish(self, handle, timeout=30.0):
        """Polls to the end. Returns "DONE", "ERR", the name of the exception that the agent raised, or "TIMEOUT"."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                state = self.agent.check_xfer_state(handle)
            except Exception as error:  # the bindings turn error statuses into exceptions
                return type(error).__name__
            if state != "PROC":
                return state
            if time.monotonic() > deadline:
                return "TIMEOUT"

    def post(self, handle, message=b""):
        try:
            return self.agent.transfer(handle, message)
        except Exception as error:
            return type(error).__name__

    def run(self, operation, local, remote, agent, message=b"", timeout=30.0, kinds=None):
        handle = self.prepare(operation, local, remote, agent, message, kinds)
        state = self.post(handle, message)
        if state == "PROC":
            state = self.finish(handle, timeout)
        handle.release()
        return state

    def move(self, operation, key, blocks, remote, agent, message=b""):
        """run() with local blocks of a buffer."""
        return self.run(operation, self.local(key, blocks), remote, agent, message)

    def try_move(self, operation, key, blocks, remote, agent, message=b""):
        """move() that returns the name of an exception that the agent raised."""
        try:
            return self.move(operation, key, blocks, remote, agent, message)
        except Exception as error:
            return type(error).__name__

    def move_until(self, operation, key, blocks, remote, agent, seconds):
        """Moves repeatedly until a transfer fails or the time is over. Returns the last state and the number of successes."""
        good, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.try_move(operation, key, blocks, remote, agent)
            if state != "DONE":
                return state, good
            good += 1
        return "DONE", good

    def prepare_as(self, name, operation, key, blocks, remote, agent):
        """prepare() for a caller that cannot hold the handle."""
        self.requests[name] = self.prepare(operation, self.local(key, blocks), remote, agent)

    def post_as(self, name, timeout=30.0):
        """Posts a prepared transfer and gives the state it ends with."""
        state = self.post(self.requests[name])
        return self.finish(self.requests[name], timeout) if state == "PROC" else state

    def benchmark(self, operation, key, blocks, remote, agent, iterations):
        """Median seconds of a transfer that is posted again and again."""
        handle = self.prepare(operation, self.local(key, blocks), remote, agent)
        seconds = []
        for _ in range(iterations + 2):
            begin = time.perf_counter()
            state = self.post(handle)
            while state == "PROC":
                state = self.agent.check_xfer_state(handle)
            seconds.append(time.perf_counter() - begin)
            check_equal(state, "DONE", operation)
        handle.release()
        return sorted(seconds[2:])[iterations // 2]

    def compute(self, key, value):
        """Fills a GPU buffer by a kernel on a separate stream and waits for it, as a caller of NIXL must."""
        torch, tensor = self.buffers[key].torch, self.buffers[key].tensor
        stream = torch.cuda.Stream(device=tensor.device)
        with torch.cuda.stream(stream):
            tensor.zero_()
            for _ in range(value):
                tensor.add_(1)
        stream.synchronize()

    def all_equal(self, key, value):
        """Whether every byte of a GPU buffer is `value`, checked by a kernel on a new stream that waits for nothing."""
        torch, tensor = self.buffers[key].torch, self.buffers[key].tensor
        stream = torch.cuda.Stream(device=tensor.device)
        with torch.cuda.stream(stream):
            return bool((tensor == value).all().item())

    def notify(self, agent, message):
        self.agent.send_notif(agent, message)

    def notifications(self, count, timeout=20.0):
        """Waits for `count` notifications; returns all of them as (agent name, message), oldest first per agent."""
        deadline = time.monotonic() + timeout
        while len(self.notes) < count and time.monotonic() < deadline:
            for name, messages in self.agent.get_new_notifs().items():
                name = name.decode() if isinstance(name, bytes) else name
                self.notes.extend((name, bytes(message)) for message in messages)
        result, self.notes = self.notes, []
        return result

    def descriptors(self):
        return len(os.listdir("/proc/self/fd"))

    def threads(self):
        return len(os.listdir("/proc/self/task"))


def enter_namespace(name):
    """Moves this thread, and those it starts later, into a network namespace of `ip netns`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as file:
        if libc.setns(file.fileno(), 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _serve(pipe, arguments, environment, namespace):
    if namespace:
        enter_namespace(namespace)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    node = None
    try:
        node = Node(**arguments)
        pipe.send(("ok", None))
    except Exception:
        pipe.send(("error", traceback.format_exc()))
        return
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            break
        if request is None:
            break
        method, args, kwargs = request
        try:
            pipe.send(("ok", getattr(node, method)(*args, **kwargs)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
    node = None  # the agent's end is part of the test: a crash shows in the exit code
    pipe.close()


class RemoteNode:
    """A Node in its own process: every method of Node, called through a pipe. `environment`: variables to set, or to unset (None);
    `namespace`: the network namespace it lives in."""

    def __init__(self, environment=None, namespace=None, **arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, arguments, environment or {}, namespace), daemon=True)
        self.process.start()
        theirs.close()
        self.result()

    def result(self, timeout=60.0):
        if not self.pipe.poll(timeout):
            raise RuntimeError(f"the other process did not answer within {timeout} s")
        status, value = self.pipe.recv()
        if status != "ok":
            raise RuntimeError("in the other process:\n" + value)
        return value

    def start(self, method, *args, **kwargs):
        self.pipe.send((method, args, kwargs))

    def __getattr__(self, method):
        def call(*args, **kwargs):
            self.start(method, *args, **kwargs)
            return self.result()

        return call

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.join()
        self.pipe.close()

    def close(self):
        """Lets the other process end and checks that it succeeded."""
        self.pipe.send(None)
        self.process.join(30)
        code = self.process.exitcode
        if code is None:
            self.kill()
        check(code == 0, f"the other process ended with {code}")


def at(address, blocks):
    base, device = address
    return [(base + offset, size, device) for offset, size in blocks]


def joined(here, there, size, mine_seed=None, theirs_seed=None):
    """The two, each with a buffer "data" and each knowing the other, and where the other's buffer is."""
    here.allocate("data", size, mine_seed)
    remote = there.allocate("data", size, theirs_seed)
    check_equal(here.connect(there.metadata()), "there", "name of the remote agent")
    check_equal(there.connect(here.metadata()), "here", "name of the remote agent, at the peer")
    return here, there, remote


def pair(size, mine_seed=None, theirs_seed=None, **keywords):
    """An agent here and one in another process, each with a buffer "data", each knowing the other."""
    return joined(Node("here", **keywords), RemoteNode(name="there", **keywords), size, mine_seed, theirs_seed)


class Failure(Exception):
    pass


class Skip(Exception):
    pass


def check(condition, message):
    if not condition:
        raise Failure(message)


def check_equal(actual, expected, what):
    check(actual == expected, f"{what}: got {actual!r}, expected {expected!r}")


CASES = {}


def case(timeout=90, **environment):
    """Registers a test; keywords become environment variables of its process."""

    def register(function):
        CASES[function.__name__] = (function, timeout, {k: str(v) for k, v in environment.items()})
        return function

    return register


SKIPPED = 77


def main(doc):
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("names", nargs="*", help="cases to run; all when none is given")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="show the output of passed cases too")
    arguments = parser.parse_args()
    if arguments.inside:
        try:
            CASES[arguments.inside][0]()
        except Skip as reason:
            print("skipped:", reason)
            sys.exit(SKIPPED)
        except Failure as failure:
            print("failed:", failure)
            # A stopped process would not end.
            for child in multiprocessing.active_children():
                child.kill()
            sys.exit(1)
        return
    counts = {"ok": 0, "FAIL": 0, "SKIP": 0}
    # Cases that mostly wait can run side by side.
    with ThreadPoolExecutor(max_workers=int(os.environ.get("NIXL_JOBS", "1"))) as pool:
        for verdict, lines in pool.map(run_case, arguments.names or CASES, itertools.repeat(arguments.verbose)):
            counts[verdict] += 1
            print("\n".join(lines), flush=True)
    if counts["SKIP"]:
        print(f"{counts['SKIP']} skipped")
    print(f"{counts['ok']} passed, {counts['FAIL']} failed", flush=True)
    sys.exit(1 if counts["FAIL"] else SKIPPED if counts["SKIP"] and not counts["ok"] else 0)


def run_case(name, verbose):
    """Runs a case in its own process. Returns the verdict and the lines to show."""
    _, timeout, environment = CASES[name]
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(sys.argv[0]), "--inside", name],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = f"no end within {timeout} s"
    text = output.decode(errors="replace")
    seconds = time.monotonic() - begin
    if code == 0:
        lines = [f"ok    {name} ({seconds:.1f} s)"] + ["        " + line[6:] for line in text.splitlines() if line.startswith("note: ")]
    elif code == SKIPPED:
        lines = [f"SKIPPED {name}: {text.strip().splitlines()[-1]}"]
    else:
        lines = [f"FAIL  {name} ({seconds:.1f} s): exit {code}"]
    if verbose or code not in (0, SKIPPED):
        lines += ["        | " + line for line in text.splitlines()[-60:]]
    return {0: "ok", SKIPPED: "SKIP"}.get(code, "FAIL"), lines
