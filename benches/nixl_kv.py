"""KV-cache-shaped reads through NIXL, TCPX beside UCX, in turns on one machine. For an idle machine; prints a table and, with --json,
one object a measurement.

    benches/nixl_kv.py [--plugin-dir DIR] [--backends TCPX,UCX/tcp,UCX/shm] [--shapes 70b-tp8,mla] [--tokens 1,32,...] [--turns 3]
                       [--seconds 2] [--in-flight 32] [--gib 6] [--memory dram|vram] [--small] [--json FILE]

scripts/nixl-bench builds and installs what it needs and starts it.

What vLLM's NixlConnector does: both sides register one cache a layer, all blocks are prepared once, a request reads the blocks of its
tokens in every layer by index into blocks that lie elsewhere, and carries a notification. `--in-flight` such requests run at a time. The
bytes of every request are compared after the last turn. `--small` measures single operations of 4 KiB, 64 KiB and 1 MiB instead, one at a
time, and beside them what NIXL's own calls cost with nothing to move.

A backend is its name and, after a slash, a transport: UCX/tcp is UCX_TLS=tcp, UCX/shm leaves UCX its choice on one host. In each turn each
backend is measured once, in a pair of fresh processes; the table has medians over the turns, and the spread. `--memory vram` moves memory of
the last GPU to the first one, and needs torch.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time

import numpy as np

BLOCK_TOKENS = 16
# Bytes of one block of one layer on one GPU. 70B TP8: one of 8 KV heads, 128 wide, K and V, bf16. MLA: 576 values a token, bf16, on every rank.
SHAPES = {
    "70b-tp8": {"layers": 80, "regions": 2, "block": BLOCK_TOKENS * 128 * 2},
    "mla": {"layers": 61, "regions": 1, "block": BLOCK_TOKENS * 576 * 2},
}
SMALL = (4096, 65536, 1 << 20)
SETTLE = 3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin-dir", help="directory with libplugin_TCPX.so; default: NIXL_PLUGIN_DIR, else that of the installed wheel")
    parser.add_argument("--backends", default="TCPX,UCX/tcp,UCX/shm")
    parser.add_argument("--shapes", default="70b-tp8,mla")
    parser.add_argument("--tokens", default="1,32,256,1024,8192,32768")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--gib", type=float, default=6, help="memory of both sides together; fewer requests are in flight where it is too little")
    parser.add_argument("--memory", choices=("dram", "vram"), default="dram")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


def environment(backend, plugin_dir, memory):
    """Variables for one backend: UCX needs NIXL's own directory, TCPX the plugin's."""
    name, _, transport = backend.partition("/")
    variables = {"NIXL_LOG_LEVEL": "ERROR"}
    if name == "UCX":
        variables["NIXL_PLUGIN_DIR"] = None
        if transport == "tcp":
            variables["UCX_TLS"] = "tcp" if memory == "DRAM" else "tcp,cuda_copy"
        elif transport == "shm":
            variables["UCX_TLS"] = None
        elif transport:
            variables["UCX_TLS"] = transport
    else:
        variables["NIXL_PLUGIN_DIR"] = plugin_dir
        variables["UCCL_TCPX_PLUGIN"] = transport or os.environ.get("UCCL_TCPX_PLUGIN", "soft")
    return name, variables


def nixl_agent(name, backend, variables):
    for key, value in variables.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    import importlib

    api = importlib.import_module(os.environ.get("NIXL_PACKAGE", "nixl") + "._api")
    return api.nixl_agent(name, api.nixl_agent_config(backends=[backend], enable_prog_thread=True))


class HostRegion:
    device = 0

    def __init__(self, size, side):
        self.array = np.empty(size, dtype=np.uint8)
        self.address, self.size = self.array.ctypes.data, size

    def write(self, content):
        self.array[:] = content

    def read(self):
        return self.array


class GpuRegion:
    """Memory of the first GPU for the initiator, of the last one for the target."""

    def __init__(self, size, side):
        import torch

        self.device = 0 if side == "initiator" else torch.cuda.device_count() - 1
        torch.cuda.set_device(self.device)
        self.tensor = torch.empty(size, dtype=torch.uint8, device=f"cuda:{self.device}")
        self.address, self.size = self.tensor.data_ptr(), size

    def write(self, content):
        import torch

        self.tensor.copy_(torch.from_numpy(content))
        # NIXL knows nothing of streams.
        torch.cuda.synchronize(self.device)

    def read(self):
        return self.tensor.cpu().numpy()


def prepare_device(job, side):
    """The engine looks for the GPU that is current when it is made."""
    if job["memory"] == "VRAM":
        GpuRegion(1, side)


class Cache:
    """The regions of all layers in one registration each, `blocks` blocks in a region. Every block has a content of its own."""

    def __init__(self, shape, blocks, seed, job, side):
        self.block, self.blocks, self.kind = shape["block"], blocks, job["memory"]
        make = HostRegion if self.kind == "DRAM" else GpuRegion
        self.regions = [make(blocks * self.block, side) for _ in range(shape["layers"] * shape["regions"])]
        for number, region in enumerate(self.regions):
            region.write(np.repeat(((np.arange(blocks) * 37 + (seed + number) * 11) % 251).astype(np.uint8), self.block))

    def register(self, agent):
        agent.register_memory([(r.address, r.size, r.device, "") for r in self.regions], self.kind)

    def descriptors(self):
        return [(r.address + i * self.block, self.block, r.device) for r in self.regions for i in range(self.blocks)]


def target(pipe, backend, variables, shape, blocks, job):
    prepare_device(job, "target")
    agent = nixl_agent("target", backend, variables)
    cache = Cache(shape, blocks, 100, job, "target")
    cache.register(agent)
    pipe.send((agent.get_agent_metadata(), cache.descriptors()))
    agent.add_remote_agent(pipe.recv())
    count = 0
    pipe.send("ready")
    while not pipe.poll(0):
        count += sum(len(messages) for messages in agent.get_new_notifs().values())
    wanted, deadline = pipe.recv(), time.monotonic() + 10
    while count < wanted and time.monotonic() < deadline:
        count += sum(len(messages) for messages in agent.get_new_notifs().values())
    pipe.send(count)
    pipe.recv()
    os._exit(0)


class Requests:
    """Reads of `tokens` tokens in every layer, by index, `in_flight` of them at a time."""

    def __init__(self, agent, cache, remote, tokens, in_flight):
        self.agent, self.cache, self.in_flight = agent, cache, in_flight
        self.mine = agent.prep_xfer_dlist("NIXL_INIT_AGENT", cache.descriptors(), cache.kind)
        self.theirs = agent.prep_xfer_dlist("target", remote, cache.kind)
        each, rows = -(-tokens // BLOCK_TOKENS), np.arange(len(cache.regions))[:, None] * cache.blocks
        random = np.random.default_rng(1)
        self.slots = []
        for slot in range(in_flight):
            # Neighbours at the owner, as a prefill leaves them; scattered here, as a pool gives them.
            theirs = slot * each + np.arange(each)
            mine = slot * each + random.permutation(each)
            self.slots.append(((rows + mine).ravel(), (rows + theirs).ravel(), mine, theirs))
        self.bytes = each * cache.block * len(cache.regions)
        self.posted = 0

    def post(self, slot):
        mine, theirs = self.slots[slot][:2]
        self.posted += 1
        handle = self.agent.make_prepped_xfer("READ", self.mine, mine, self.theirs, theirs, b"read:%d" % slot)
        begin = time.perf_counter()
        state = self.agent.transfer(handle)
        return handle, begin, state

    def run(self, seconds):
        """Seconds of each request and of all."""
        times, begin = [], time.perf_counter()
        flying = {slot: self.post(slot) for slot in range(self.in_flight)}
        while flying:
            for slot, (handle, posted, state) in list(flying.items()):
                state = self.agent.check_xfer_state(handle) if state == "PROC" else state
                if state == "PROC":
                    continue
                if state != "DONE":
                    raise SystemExit(f"a request ended with {state}")
                now = time.perf_counter()
                times.append(now - posted)
                self.agent.release_xfer_handle(handle)
                del flying[slot]
                if now - begin < seconds:
                    flying[slot] = self.post(slot)
        return times, time.perf_counter() - begin

    def right(self):
        for number, region in enumerate(self.cache.regions):
            rows = region.read().reshape(self.cache.blocks, self.cache.block)
            for _, _, mine, theirs in self.slots:
                expected = ((theirs * 37 + (100 + number) * 11) % 251).astype(np.uint8)
                if not (rows[mine] == expected[:, None]).all():
                    return False
        return True


def small_operations(agent, cache, remote, seconds):
    """Single operations, one at a time: the median seconds of each size and direction, and of NIXL's calls alone."""
    rows = []
    base, device = cache.regions[0].address, cache.regions[0].device
    for operation in ("WRITE", "READ"):
        for size in SMALL:
            local, there = (agent.get_xfer_descs([(at, size, gpu)], cache.kind) for at, gpu in ((base, device), (remote[0][0], remote[0][2])))
            handle = agent.initialize_xfer(operation, local, there, "target", b"")
            times, until = [], time.perf_counter() + seconds
            while len(times) < 100 or time.perf_counter() < until:
                begin = time.perf_counter()
                state = agent.transfer(handle)
                while state == "PROC":
                    state = agent.check_xfer_state(handle)
                if state != "DONE":
                    raise SystemExit(f"an operation ended with {state}")
                times.append(time.perf_counter() - begin)
            agent.release_xfer_handle(handle)
            rows.append({"op": operation, "bytes": size, "p50_us": statistics.median(times) * 1e6, "p99_us": float(np.percentile(times, 99) * 1e6)})
    local, there = (agent.get_xfer_descs([(at, 0, gpu)], cache.kind) for at, gpu in ((base, device), (remote[0][0], remote[0][2])))
    try:
        handle = agent.initialize_xfer("WRITE", local, there, "target", b"")
        times = []
        for _ in range(2000):
            begin = time.perf_counter()
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            times.append(time.perf_counter() - begin)
        rows.append({"op": "nothing", "bytes": 0, "p50_us": statistics.median(times) * 1e6, "p99_us": float(np.percentile(times, 99) * 1e6)})
    except Exception as error:
        print(f"note: a transfer of nothing is refused: {error}", file=sys.stderr)
    return rows


def initiator(pipe, results, backend, variables, shape, blocks, job):
    prepare_device(job, "initiator")
    agent = nixl_agent("initiator", backend, variables)
    cache = Cache(shape, blocks, 7, job, "initiator")
    cache.register(agent)
    metadata, remote = pipe.recv()
    agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    pipe.recv()
    if job["small"]:
        results.send(small_operations(agent, cache, remote, job["seconds"]))
        posted = 0
    else:
        requests = Requests(agent, cache, remote, job["tokens"], job["in_flight"])
        for _ in range(SETTLE):
            requests.run(0)
        times, seconds = requests.run(job["seconds"])
        if not requests.right():
            raise SystemExit("wrong bytes")
        posted = requests.posted
        results.send([{"requests": len(times), "bytes": requests.bytes, "gbytes_per_s": len(times) * requests.bytes / seconds / 1e9,
                       "p50_ms": statistics.median(times) * 1e3, "p99_ms": float(np.percentile(times, 99) * 1e3)}])
    pipe.send(posted)
    count = pipe.recv()
    if count != posted:
        print(f"note: {backend}: {count} notifications of {posted}", file=sys.stderr)
    pipe.send("end")
    sys.stdout.flush()
    os._exit(0)


def measure(backend, plugin_dir, shape, blocks, job):
    """One measurement in a fresh pair of processes; None when it failed."""
    name, variables = environment(backend, plugin_dir, job["memory"])
    context = multiprocessing.get_context("spawn")
    a, b = context.Pipe()
    receive, send = context.Pipe(duplex=False)
    there = context.Process(target=target, args=(b, name, variables, shape, blocks, job))
    here = context.Process(target=initiator, args=(a, send, name, variables, shape, blocks, job))
    there.start()
    here.start()
    a.close()
    b.close()
    send.close()
    try:
        rows = receive.recv() if receive.poll(120 + 20 * job["seconds"]) else None
    except EOFError:
        rows = None
    here.join(30)
    there.join(5)
    for process in (here, there):
        if process.is_alive():
            process.kill()
            process.join()
    return rows


def plugin_directory(chosen):
    if chosen or os.environ.get("NIXL_PLUGIN_DIR"):
        return os.path.abspath(chosen or os.environ["NIXL_PLUGIN_DIR"])
    import nixl_tcpx

    return nixl_tcpx.plugin_dir()


def jobs(options):
    """(shape name, shape, blocks a region, job) in the order of the table."""
    if options.small:
        shape = {"layers": 1, "regions": 1, "block": SMALL[-1]}
        return [("single", shape, 1, {"small": True, "memory": options.memory.upper(), "seconds": options.seconds})]
    found = []
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        for tokens in map(int, options.tokens.split(",")):
            each = -(-tokens // BLOCK_TOKENS)
            per_request = each * shape["block"] * shape["layers"] * shape["regions"]
            in_flight = max(1, min(options.in_flight, int(options.gib * 2**30) // 2 // per_request))
            job = {"small": False, "memory": options.memory.upper(), "tokens": tokens, "in_flight": in_flight, "seconds": options.seconds}
            found.append((name, shape, each * in_flight, job))
    return found


def table(rows, backends):
    """Medians over the turns, one line a row of the measurement, one column a backend."""
    print("| | " + " | ".join(backends) + " |")
    print("|---" * (1 + len(backends)) + "|")
    keys = list(dict.fromkeys(row["key"] for row in rows))
    for key in keys:
        cells = []
        for backend in backends:
            mine = [row for row in rows if row["key"] == key and row["backend"] == backend]
            measure = "gbytes_per_s" if mine and "gbytes_per_s" in mine[0] else "p50_us"
            values = [row[measure] for row in mine]
            unit = "GB/s" if measure == "gbytes_per_s" else "us"
            cells.append(f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})" if values else "failed")
        print(f"| {key} | " + " | ".join(cells) + " |")


def main():
    options = arguments()
    plugin_dir, backends, rows = plugin_directory(options.plugin_dir), options.backends.split(","), []
    print(f"{platform.node()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d %H:%M')}", file=sys.stderr)
    if os.getloadavg()[0] > 0.3 * os.cpu_count():
        print("WARNING: this machine is not idle", file=sys.stderr)
    for name, shape, blocks, job in jobs(options):
        for turn in range(options.turns):
            # Each turn begins with another backend, so that none always follows the same one.
            for backend in backends[turn % len(backends):] + backends[:turn % len(backends)]:
                for row in measure(backend, plugin_dir, shape, blocks, job) or []:
                    key = f"{row['op']} {row['bytes']}" if job["small"] else f"{name}, {job['tokens']} tokens, {job['in_flight']} in flight"
                    rows.append({"backend": backend, "turn": turn, "key": key, **row})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table(rows, backends)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"host": platform.node(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%dT%H:%M:%S"), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
