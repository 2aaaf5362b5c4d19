"""A model's work beside transfers on one host: the reader's process multiplies matrices on the GPU into which it reads, as a serving engine
does. One JSON object a row: the time of a transfer alone and beside, of a multiplication alone and beside. Needs torch and a nixl wheel.

usage: nixl_beside.py SECONDS [ROW...]    variables: see nixl_pair.py; UCCL_TCPX_LOCAL_BLOCKS is part of each row. BACKEND=batch: not NIXL, but
       copies of the same lists inside the process by the driver's cuMemcpyBatchAsync
"""
import ctypes
import json
import os
import sys
import time

import common
import numpy as np
import torch

SIDE = 8192
TOTAL = 64 << 20
ROWS = [f"READ:{TOTAL}:{block}" for block in (TOTAL, 32 << 10, 4 << 10)]


class Model:
    """Multiplications of bfloat16 matrices, on a stream of their own."""

    def __init__(self):
        self.a, self.b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.out, self.stream = torch.empty_like(self.a), torch.cuda.Stream()
        self.milliseconds(20)
        self.alone = self.milliseconds(50)

    def start(self, count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            begin.record()
            for _ in range(count):
                torch.matmul(self.a, self.b, out=self.out)
            end.record()
        return begin, end

    def milliseconds(self, count):
        begin, end = self.start(count)
        end.synchronize()
        return begin.elapsed_time(end) / count


def beside(once, seconds):
    """Milliseconds of a multiplication alone and beside, and the times of the transfers meanwhile."""
    model = Model()
    count = max(20, int(seconds * 1e3 / model.alone))
    begin, end = model.start(count)
    times = []
    while not end.query():
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    # The last one ran beside only a part.
    return model.alone, begin.elapsed_time(end) / count, sorted(times[:-1] or times)


def show(once, seconds, times):
    alone, together, meanwhile = beside(once, seconds)
    print(json.dumps({
        "beside": "GEMM", "blocks": os.environ.get("UCCL_TCPX_LOCAL_BLOCKS", "default"), "gemm_ms": alone, "gemm_beside_ms": together, "transfers_beside": len(meanwhile),
        "transfer_us": common.percentile(times, 50) * 1e6, "transfer_beside_us": common.percentile(meanwhile, 50) * 1e6,
    }), flush=True)


def batch(seconds, rows):
    """The same lists by the driver, which chooses between copy engines and kernels."""
    driver = ctypes.CDLL("libcuda.so.1")
    call = getattr(driver, "cuMemcpyBatchAsync_v2")
    source, dest = (torch.zeros(TOTAL, dtype=torch.uint8, device="cuda") for _ in range(2))
    for _, total, block in rows:
        count = total // block
        order = np.random.default_rng(1).permutation(count)
        sizes = np.full(count, block, dtype=np.uint64)
        sources = (source.data_ptr() + order * block).astype(np.uint64)
        dests = (dest.data_ptr() + np.arange(count) * block).astype(np.uint64)
        # CUmemcpyAttributes: the order of source accesses (1: that of the stream), two hints of places, flags.
        attributes, first = np.array([1, 0, 0, 0, 0, 0], dtype=np.int32), np.zeros(1, dtype=np.uint64)
        at = [ctypes.c_void_p(array.ctypes.data) for array in (dests, sources, sizes, attributes, first)]
        stream = torch.cuda.Stream()

        def once():
            code = call(at[0], at[1], at[2], ctypes.c_size_t(count), at[3], at[4], ctypes.c_size_t(1), ctypes.c_void_p(stream.cuda_stream))
            if code != 0:
                raise SystemExit(f"cuMemcpyBatchAsync: error {code}")
            stream.synchronize()

        times, used = common.timed(once, seconds, os.getpid())
        show(once, seconds, times)
        common.report("batch", total, block, times, used)


def main():
    seconds, rows = float(sys.argv[1]), sys.argv[2:] or ROWS
    if BATCH:
        batch(seconds, common.parse_rows(rows))
    else:
        nixl_pair.main(nixl_vram.Vram(), seconds, rows)


BATCH = os.environ.get("BACKEND") == "batch"
if not BATCH:
    # Here, and so in the processes that are spawned, too.
    import nixl_pair
    import nixl_vram

    plain = common.timed

    def timed(once, seconds, other):
        times, used = plain(once, seconds, other)
        show(once, seconds, times)
        return times, used

    common.timed = timed

if __name__ == "__main__":
    main()
