"""KV-cache-shaped reads and single operations through NIXL, TCPX beside UCX, in turns on one machine. For an idle machine; prints tables
and, with --json, writes one object a measurement.

    benches/nixl_kv.py [--plugin-dir DIR] [--backends TCPX,TCPX/channels,UCX/tcp,UCX/shm] [--shapes 70b-tp8,mla,single] [--tokens 1,32,...]
                       [--turns 3] [--seconds 2] [--in-flight 32] [--gib 6] [--memory dram|vram] [--minutes N] [--json FILE]

scripts/nixl-bench builds and installs what it needs and starts it; scripts/gpu-bench-kv starts it from a bundle on a GPU machine.

What vLLM's NixlConnector does: both agents register one cache per layer, all blocks are prepared once, a request reads the blocks of its
tokens in every layer by index into blocks that lie elsewhere, and carries a notification. `--in-flight` such requests run at a time. The
bytes of every request are compared after each measurement. The shape `single` measures single operations of 4 KiB, 64 KiB and 1 MiB, one at
a time, and beside them what NIXL's own calls cost with nothing to move; `--small` is that shape alone.

A backend is its name and, after a slash, a way: UCX/tcp is UCX_TLS=tcp, UCX/shm leaves UCX its choice on one host; TCPX uses direct transfers on one host,
TCPX/channels moves everything over network channels, as between hosts. In each turn each backend is measured once, in a pair of fresh processes for
each shape; the tables have medians over the turns, and the spread. After `--minutes` no pair is started. `--memory vram` moves memory of
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
    "single": {"layers": 1, "regions": 1, "block": 1 << 20},
}
SMALL = (4096, 65536, 1 << 20)
SETTLE = 3
INITIATOR_SEED, TARGET_SEED = 7, 100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin-dir", help="directory with libplugin_TCPX.so; default: NIXL_PLUGIN_DIR, else that of the installed wheel")
    parser.add_argument("--backends", default="TCPX,TCPX/channels,UCX/tcp,UCX/shm")
    parser.add_argument("--shapes", default="70b-tp8,mla")
    parser.add_argument("--tokens", default="1,32,256,1024,8192,32768")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--gib", type=float, default=6, help="memory of both processes together; fewer requests are in flight if it is too small")
    parser.add_argument("--memory", choices=("dram", "vram"), default="dram")
    parser.add_argument("--small", action="store_true", help="the shape `single` alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no pair of processes is started afterwards")
    parser.add_argument("--json")
    return parser.parse_args()


def environment(backend, plugin_dir, memory):
    """Variables for one backend: UCX needs NIXL's own directory, TCPX the plugin's."""
    name, _, way = backend.partition("/")
    variables = {"NIXL_LOG_LEVEL": "ERROR"}
    if name == "UCX":
        variables["NIXL_PLUGIN_DIR"] = None
        if way:
            variables["UCX_TLS"] = {"tcp": "tcp" if memory == "DRAM" else "tcp,cuda_copy", "shm": None}.get(way, way)
    else:
        variables["NIXL_PLUGIN_DIR"] = plugin_dir
        variables["UCCL_TCPX_PLUGIN"] = os.environ.get("UCCL_TCPX_PLUGIN", "soft")
        variables["UCCL_P2P_DISABLE_IPC"] = "1" if way == "channels" else None
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
        self.array[:content.size] = content

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

        self.tensor[:content.size].copy_(torch.from_numpy(content))
        # NIXL knows nothing of streams.
        torch.cuda.synchronize(self.device)

    def read(self):
        return self.tensor.cpu().numpy()


def prepare_device(job, side):
    """The engine uses the GPU that is current when it is created."""
    if job["memory"] == "VRAM":
        GpuRegion(1, side)


class Cache:
    """The regions of all layers in one registration each, `blocks` blocks in a region. Every block has distinct content."""

    def __init__(self, job, side):
        shape = job["shape"]
        self.block, self.blocks, self.kind = shape["block"], job["blocks"], job["memory"]
        make = HostRegion if self.kind == "DRAM" else GpuRegion
        self.regions = [make(self.blocks * self.block, side) for _ in range(shape["layers"] * shape["regions"])]

    def fill(self, seed, blocks=None):
        """The first blocks of every region, or all."""
        for number, region in enumerate(self.regions):
            region.write(np.repeat(((np.arange(blocks or self.blocks) * 37 + (seed + number) * 11) % 251).astype(np.uint8), self.block))

    def register(self, agent):
        agent.register_memory([(r.address, r.size, r.device, "") for r in self.regions], self.kind)

    def descriptors(self):
        places = np.empty((len(self.regions), self.blocks, 3), dtype=np.uint64)
        for rows, region in zip(places, self.regions):
            rows[:, 0] = region.address + np.arange(self.blocks, dtype=np.uint64) * np.uint64(self.block)
            rows[:, 1:] = self.block, region.device
        return places.reshape(-1, 3)


def target(pipe, backend, variables, job):
    prepare_device(job, "target")
    agent = nixl_agent("target", backend, variables)
    cache = Cache(job, "target")
    cache.fill(TARGET_SEED)
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

    def __init__(self, agent, cache, mine, theirs, tokens, in_flight):
        self.agent, self.cache, self.mine, self.theirs, self.in_flight = agent, cache, mine, theirs, in_flight
        each, rows = -(-tokens // BLOCK_TOKENS), np.arange(len(cache.regions))[:, None] * cache.blocks
        random = np.random.default_rng(1)
        self.slots = []
        for slot in range(in_flight):
            # Neighbours at the owner, as a prefill leaves them; scattered here, as a pool gives them.
            there = slot * each + np.arange(each)
            here = slot * each + random.permutation(each)
            self.slots.append(((rows + here).ravel(), (rows + there).ravel(), here, there))
        cache.fill(INITIATOR_SEED, each * in_flight)
        self.bytes = each * cache.block * len(cache.regions)
        self.posted = 0

    def settle(self, seconds):
        """Warm-up rounds; fewer if a round is long."""
        until = time.monotonic() + seconds
        for _ in range(SETTLE):
            self.run(0)
            if time.monotonic() > until:
                break

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
                expected = ((theirs * 37 + (TARGET_SEED + number) * 11) % 251).astype(np.uint8)
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


def kv_reads(agent, cache, remote, job, results):
    """A row for each number of tokens, sent as soon as it is measured. How many notifications were sent."""
    mine = agent.prep_xfer_dlist("NIXL_INIT_AGENT", cache.descriptors(), cache.kind)
    theirs = agent.prep_xfer_dlist("target", remote, cache.kind)
    posted = 0
    for row in job["rows"]:
        requests = Requests(agent, cache, mine, theirs, row["tokens"], row["in_flight"])
        requests.settle(job["seconds"])
        times, seconds = requests.run(job["seconds"])
        if not requests.right():
            raise SystemExit("wrong bytes")
        posted += requests.posted
        results.send({"key": f"{job['name']}, {row['tokens']} tokens, {row['in_flight']} in flight", "requests": len(times),
                      "bytes": requests.bytes, "gbytes_per_s": len(times) * requests.bytes / seconds / 1e9,
                      "p50_ms": statistics.median(times) * 1e3, "p99_ms": float(np.percentile(times, 99) * 1e3)})
    return posted


def initiator(pipe, results, backend, variables, job):
    prepare_device(job, "initiator")
    agent = nixl_agent("initiator", backend, variables)
    cache = Cache(job, "initiator")
    cache.register(agent)
    metadata, remote = pipe.recv()
    agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    pipe.recv()
    posted = 0
    if job["rows"]:
        posted = kv_reads(agent, cache, remote, job, results)
    else:
        for row in small_operations(agent, cache, remote, job["seconds"]):
            results.send({"key": f"{row['op']} {row['bytes']}", **row})
    pipe.send(posted)
    count = pipe.recv()
    if count != posted:
        print(f"note: {backend}: {count} notifications of {posted}", file=sys.stderr)
    pipe.send("end")
    sys.stdout.flush()
    os._exit(0)


def measure(backend, plugin_dir, job):
    """The rows of one shape in a new pair of processes; after a failure, those measured before it."""
    name, variables = environment(backend, plugin_dir, job["memory"])
    context = multiprocessing.get_context("spawn")
    a, b = context.Pipe()
    receive, send = context.Pipe(duplex=False)
    there = context.Process(target=target, args=(b, name, variables, job))
    here = context.Process(target=initiator, args=(a, send, name, variables, job))
    there.start()
    here.start()
    for end in (a, b, send):
        end.close()
    rows = []
    try:
        while receive.poll(120 + 20 * job["seconds"]):
            rows.append(receive.recv())
    except EOFError:
        pass
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
    """One job per shape, with the rows that a pair of processes measures."""
    found = []
    for name in ["single"] if options.small else options.shapes.split(","):
        shape, rows = SHAPES[name], []
        for tokens in map(int, options.tokens.split(",")) if name != "single" else ():
            each = -(-tokens // BLOCK_TOKENS)
            per_request = each * shape["block"] * shape["layers"] * shape["regions"]
            in_flight = max(1, min(options.in_flight, int(options.gib * 2**30) // 2 // per_request))
            rows.append({"tokens": tokens, "in_flight": in_flight, "blocks": each * in_flight})
        blocks = max((row["blocks"] for row in rows), default=1)
        found.append({"name": name, "shape": shape, "rows": rows, "blocks": blocks, "memory": options.memory.upper(), "seconds": options.seconds})
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
            cells.append(f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})" if values else "none")
        print(f"| {key} | " + " | ".join(cells) + " |")


def write(options, rows):
    """Writes the whole file again, so that a stopped run keeps its results."""
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump({"host": platform.node(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%dT%H:%M:%S"), "memory": options.memory, "rows": rows},
                  file, indent=1)


def main():
    options = arguments()
    plugin_dir, backends, rows = plugin_directory(options.plugin_dir), options.backends.split(","), []
    until = time.monotonic() + options.minutes * 60
    print(f"{platform.node()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d %H:%M')}", file=sys.stderr)
    if os.getloadavg()[0] > 0.3 * os.cpu_count():
        print("WARNING: this machine is not idle", file=sys.stderr)
    for turn in range(options.turns):
        for job in jobs(options):
            # Each turn begins with another backend, so that none always follows the same one.
            for backend in backends[turn % len(backends):] + backends[:turn % len(backends)]:
                if time.monotonic() > until:
                    print(f"note: turn {turn}: no time for {job['name']} over {backend}", file=sys.stderr)
                    continue
                for row in measure(backend, plugin_dir, job):
                    rows.append({"backend": backend, "turn": turn, **row})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if options.json:
                    write(options, rows)
    table(rows, backends)
    sys.exit(0 if rows else "nothing could be measured")


if __name__ == "__main__":
    main()
