"""Shared by the baselines: the rows, the timed loop, CPU time of both processes. One JSON object per row on standard output.

Rows are read from the command line as OP:TOTAL:BLOCK (bytes), or `notify`. Blocks smaller than the total lie in random order at the
target. Each row has fresh buffers, is warmed up, and then repeated for the given time.
"""
import json
import os
import time

WARMUP = 3
MIN_ITERS = 5
MAX_ITERS = 10_000


def parse_rows(words):
    rows = []
    for word in words:
        if word == "notify":
            rows.append(("notify", 0, 0))
        else:
            op, total, block = word.split(":")
            rows.append((op, int(total), int(block)))
    return rows


def cpu_of(pid):
    """CPU seconds of a process and its ended threads, in nanosecond resolution (the kernel's CPU clock of another process)."""
    return time.clock_gettime((~pid << 3) | 2)


def percentile(ordered, p):
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)]


def timed(once, seconds, other):
    """Repeats `once`; returns sorted seconds of each iteration and the CPU seconds that both processes used."""
    for _ in range(WARMUP):
        once()
    used = cpu_of(os.getpid()) + cpu_of(other)
    times, until = [], time.perf_counter() + seconds
    while len(times) < MIN_ITERS or (time.perf_counter() < until and len(times) < MAX_ITERS):
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    used = cpu_of(os.getpid()) + cpu_of(other) - used
    return sorted(times), used


def report(op, total, block, times, used, posts=()):
    median = percentile(times, 50)
    row = {"op": op, "total_bytes": total, "block_bytes": block, "iters": len(times), "avg_us": sum(times) / len(times) * 1e6, "p50_us": median * 1e6,
           "p99_us": percentile(times, 99) * 1e6}
    if posts:
        row["post_p50_us"] = percentile(sorted(posts[WARMUP:]), 50) * 1e6
    if total:
        row["gbytes_per_s"] = total / median / 1e9
        row["cpu_s_per_gib"] = used * 2**30 / (total * len(times))
    print(json.dumps(row), flush=True)


def run_pair(target, initiator, *args):
    """Runs both ends in two spawned processes joined by a pipe; true when the initiator succeeded."""
    import multiprocessing as mp

    mp.set_start_method("spawn")
    a, b = mp.Pipe()
    sides = [mp.Process(target=initiator, args=(a, *args)), mp.Process(target=target, args=(b, *args))]
    for side in sides:
        side.start()
    a.close()
    b.close()
    sides[0].join()
    sides[1].join(2)
    if sides[1].is_alive():
        sides[1].kill()
        sides[1].join()
    return sides[0].exitcode == 0
