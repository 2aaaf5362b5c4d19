"""Runs pair.cpp over UCCL's engine: the peer that is killed first, then the speeds beside tcpx-perf's, in turns. Prints a table.

    compare.py PAIR TCPX_PERF SECONDS_A_ROW      TURNS=3
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys

TURNS = int(os.environ.get("TURNS", "3"))
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
# The engine's own meaning of the variable; over tcpx-perf it would ask for Google's plugin.
ENGINE = {**os.environ, "UCCL_P2P_TRANSPORT": "tcpx"}


@contextlib.contextmanager
def server(command, prefix, **options):
    """A server process and its output after the prefix."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options)
    try:
        for line in process.stdout:
            if line.startswith(prefix):
                yield process, line[len(prefix):].strip()
                return
        sys.exit(f"{command[0]} did not start")
    finally:
        process.kill()
        process.wait()


def check_orphan(pair):
    with server([pair, "server"], "META ", env=ENGINE) as (peer, metadata):
        orphan = subprocess.Popen([pair, "orphan", metadata], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENGINE, stderr=subprocess.PIPE)
        while (line := orphan.stdout.readline()) != "ready\n":
            if not line:
                sys.exit("no transfer to a live peer:\n" + orphan.stderr.read())
        peer.kill()
        output, errors = orphan.communicate("\n", timeout=120)
    if orphan.returncode != 0 or "ok" not in output:
        sys.exit(f"FAILED: a peer that was killed, status {orphan.returncode}\n{errors[-2000:]}")
    print("ok    a killed peer makes transfers fail, and nothing terminates")


def engine_rows(pair, seconds):
    with server([pair, "server"], "META ", env=ENGINE) as (_, metadata):
        done = subprocess.run([pair, "client", metadata, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENGINE, timeout=300)
    if done.returncode != 0:
        sys.exit(f"FAILED: {done.stderr[-2000:]}")
    return {(row["op"], row["total_bytes"]): row["p50_us"] for row in map(json.loads, filter(lambda l: l.startswith("{"), done.stdout.splitlines()))}


def perf_rows(perf, seconds):
    rows = {}
    with server([perf, "server"], "") as (_, address):
        for op in ("read", "write"):
            for size in SIZES:
                words = [perf, "client", address, "--op", op, "--total", str(size), "--time", str(seconds), "--json", "-"]
                done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, timeout=60)
                rows[op, size] = json.loads(done.stdout)[0]["p50_us"]
    return rows


def main():
    pair, perf, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    check_orphan(pair)
    turns = [(engine_rows(pair, seconds), perf_rows(perf, seconds)) for _ in range(TURNS)]
    print(f"\nMicroseconds, medians of {TURNS} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.\n")
    print("| row | UCCL's engine | tcpx-perf | ratio, median of turns |\n|---|---|---|---|")
    for op in ("read", "write"):
        for size in SIZES:
            ours = [turn[0][op, size] for turn in turns]
            theirs = [turn[1][op, size] for turn in turns]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs))
            print(f"| {op} {size >> 10} KiB | {statistics.median(ours):.0f} | {statistics.median(theirs):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
