#!/usr/bin/env python3
"""The engine as a guest of PyTorch, through the C ABI: torch captures CUDA graphs in global mode while transfers run in both directions,
computes on a default stream that delays no transfer, and lends memory of its expandable segments and of another process (CUDA IPC).

usage: torch_guest.py LIBRARY capture|busy|expandable|imported      exit status 77: skipped
"""

import ctypes
import os
import sys
import threading
import time

MIB = 1 << 20
WAIT_MS = 60_000
CYCLES = 12_000_000_000  # of the GPU's clock: some seconds


def fail(what):
    print(f"FAILED: {what}")
    sys.stdout.flush()
    os._exit(1)


class FifoItem(ctypes.Structure):
    _fields_ = [
        ("addr", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("rkey", ctypes.c_uint32),
        ("nmsgs", ctypes.c_uint32),
        ("rid", ctypes.c_uint32),
        ("idx", ctypes.c_uint64),
        ("padding", ctypes.c_char * 32),
    ]


def load(path):
    lib = ctypes.CDLL(path)
    p, u64, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
    for name, result, arguments in [
        ("create", p, [ctypes.c_int, ctypes.c_bool]),
        ("destroy", None, [p]),
        ("metadata_into", ctypes.c_int, [p, ctypes.c_char_p, size, p]),
        ("connect", p, [p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_bool]),
        ("accept", p, [p, ctypes.c_char_p, size, ctypes.POINTER(ctypes.c_int)]),
        ("conn_destroy", None, [p]),
        ("reg", ctypes.c_int, [p, size, size, ctypes.POINTER(u64)]),
        ("mr_destroy", None, [p, u64]),
        ("prepare_fifo", ctypes.c_int, [p, u64, p, size, ctypes.POINTER(FifoItem)]),
        ("write", ctypes.c_int, [p, u64, p, size, FifoItem, ctypes.POINTER(u64)]),
        ("read", ctypes.c_int, [p, u64, p, size, FifoItem, ctypes.POINTER(u64)]),
        ("wait", ctypes.c_int, [p, u64, ctypes.c_int64]),
        ("last_error", ctypes.c_char_p, []),
    ]:
        function = getattr(lib, f"uccl_engine_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(lib, name, function)
    return lib


class Engine:
    def __init__(self, lib):
        self.lib = lib
        self.handle = lib.create(4, False)
        self.need(self.handle, "create")

    def need(self, ok, what):
        if not ok:
            fail(f"{what}: {(self.lib.last_error() or b'').decode()}")

    def port(self):
        text = ctypes.create_string_buffer(256)
        self.need(self.lib.metadata_into(self.handle, text, 256, None) == 0, "metadata")
        return int(text.value.decode().split("?")[0].rsplit(":", 1)[1])

    def connect(self, other):
        out = self.lib.connect(self.handle, b"127.0.0.1", b"", other.port(), False)
        self.need(out, "connect")
        inbound = other.lib.accept(other.handle, ctypes.create_string_buffer(64), 64, ctypes.byref(ctypes.c_int()))
        self.need(inbound, "accept")
        return out, inbound

    def destroy(self):
        self.lib.destroy(self.handle)


class Region:
    """A registered tensor. Uses only its address of torch, so that a capture may be active."""

    def __init__(self, engine, address, size):
        self.engine, self.address, self.size = engine, address, size
        mr = ctypes.c_uint64()
        engine.need(engine.lib.reg(engine.handle, address, size, ctypes.byref(mr)) == 0, "register")
        self.mr, self.item = mr.value, FifoItem()
        engine.need(engine.lib.prepare_fifo(engine.handle, self.mr, address, size, ctypes.byref(self.item)) == 0, "prepare_fifo")


def move(conn, verb, near, far):
    lib, transfer = near.engine.lib, ctypes.c_uint64()
    started = getattr(lib, verb)(conn, near.mr, near.address, near.size, far.item, ctypes.byref(transfer))
    near.engine.need(started == 0, verb)
    near.engine.need(lib.wait(conn, transfer.value, WAIT_MS) == 0, f"wait for a {verb}")


def place(tensor):
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def pattern(torch, size, seed):
    return ((torch.arange(size, device="cuda") * 7 + seed) % 251).to(torch.uint8)


def case_capture(torch, lib):
    tensors = [pattern(torch, 4 * MIB, 1), torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")]
    tensors += [pattern(torch, 700, 2), torch.zeros(700, dtype=torch.uint8, device="cuda")]
    x = torch.ones(1 << 16, device="cuda")
    places = [place(t) for t in tensors]
    torch.cuda.synchronize()
    capturing, done = threading.Event(), threading.Event()

    def transfers():
        capturing.wait()
        for _ in range(3):
            a, b = Engine(lib), Engine(lib)
            regions = [Region((a, b)[i % 2], *p) for i, p in enumerate(places)]
            out, inbound = a.connect(b)
            for _ in range(20):
                move(out, "write", regions[0], regions[1])
                move(inbound, "write", regions[1], regions[0])
                move(out, "read", regions[0], regions[1])
                move(out, "write", regions[2], regions[3])
            lib.conn_destroy(out)
            lib.conn_destroy(inbound)
            a.destroy()
            b.destroy()
        done.set()

    thread = threading.Thread(target=transfers)
    thread.start()
    captures = 0
    while not done.is_set() and thread.is_alive():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # captures in global mode
            y = x * 2 + 1
            capturing.set()
            time.sleep(0.01)
            z = y + x
        graph.replay()
        torch.cuda.synchronize()
        if not bool((z == 4).all()):
            fail("a captured graph gives a wrong result")
        captures += 1
    thread.join()
    if not done.is_set() or captures < 2:
        fail(f"the transfers did not end, or only {captures} captures ran beside them")
    if not torch.equal(tensors[0], tensors[1]) or not torch.equal(tensors[2], tensors[3]):
        fail("wrong bytes")
    print(f"{captures} captures beside transfers")


def case_busy(torch, lib):
    tensors = [pattern(torch, 16 * MIB, 1), torch.zeros(16 * MIB, dtype=torch.uint8, device="cuda")]
    tensors += [pattern(torch, 700, 2), torch.zeros(700, dtype=torch.uint8, device="cuda")]
    places = [place(t) for t in tensors]
    end = torch.cuda.Event()
    torch.cuda.synchronize()
    # The library's state per process and GPU exists before the stream gets busy.
    first = Engine(lib)
    Region(first, *places[2])
    first.destroy()
    begin = time.monotonic()
    torch.cuda._sleep(CYCLES)
    end.record()
    steps = []

    def step(what):
        steps.append(f"{what} {time.monotonic() - begin:.3f} s")
        if end.query():
            fail(f"{what} waited for the default stream: {', '.join(steps)}")

    a, b = Engine(lib), Engine(lib)
    regions = [Region((a, b)[i % 2], *p) for i, p in enumerate(places)]
    step("registered")
    out, inbound = a.connect(b)
    step("connected")
    move(out, "write", regions[0], regions[1])
    step("wrote")
    move(inbound, "read", regions[1], regions[0])
    step("read")
    move(out, "write", regions[2], regions[3])
    step("wrote a few bytes")
    lib.conn_destroy(out)
    lib.conn_destroy(inbound)
    step("closed")
    for region in regions:
        lib.mr_destroy(region.engine.handle, region.mr)
    step("deregistered")
    a.destroy()
    b.destroy()
    step("destroyed")
    torch.cuda.synchronize()
    if not torch.equal(tensors[0], tensors[1]) or not torch.equal(tensors[2], tensors[3]):
        fail("wrong bytes")
    print(f"{', '.join(steps)}; the default stream was busy for {time.monotonic() - begin:.3f} s")


def case_expandable(torch, lib):
    near, far = pattern(torch, 150 * MIB, 1), torch.zeros(150 * MIB, dtype=torch.uint8, device="cuda")
    if not any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()):
        fail("torch took no expandable segment")
    torch.cuda.synchronize()
    a, b = Engine(lib), Engine(lib)
    out, _inbound = a.connect(b)
    # Neither end is page-aligned, like tensors in a segment.
    n = near.numel() - 1000
    regions = [Region(a, near.data_ptr() + 512, n), Region(b, far.data_ptr() + 512, n)]
    move(out, "write", *regions)
    if not torch.equal(near[512 : 512 + n], far[512 : 512 + n]) or int(far[:512].sum()) or int(far[512 + n :].sum()):
        fail("wrong bytes")
    near.zero_()
    torch.cuda.synchronize()
    move(out, "read", *regions)
    if not torch.equal(near[512 : 512 + n], far[512 : 512 + n]):
        fail("wrong bytes read")
    a.destroy()
    b.destroy()


def owner(queue, done):
    import torch

    tensor = pattern(torch, 8 * MIB, 5)
    torch.cuda.synchronize()
    queue.put(tensor)
    done.wait(120)


def case_imported(torch, lib):
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue, done = context.Queue(), context.Event()
    process = context.Process(target=owner, args=(queue, done))
    process.start()
    theirs = queue.get(timeout=120)
    mine = torch.zeros_like(theirs)
    torch.cuda.synchronize()
    a, b = Engine(lib), Engine(lib)
    out, _inbound = a.connect(b)
    near, far = Region(a, *place(theirs)), Region(b, *place(mine))
    move(out, "write", near, far)
    if not torch.equal(mine, pattern(torch, 8 * MIB, 5)):
        fail("wrong bytes of imported memory")
    mine.fill_(9)
    torch.cuda.synchronize()
    move(out, "read", near, far)
    if not bool((theirs == 9).all()):
        fail("wrong bytes in imported memory")
    a.destroy()
    b.destroy()
    del theirs
    done.set()
    process.join(60)


def main():
    library, case = sys.argv[1], sys.argv[2]
    if case == "expandable":
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        print("SKIPPED: torch with a GPU is needed")
        sys.exit(77)
    torch.cuda.init()
    globals()[f"case_{case}"](torch, load(library))
    print("ok")


if __name__ == "__main__":
    main()
