"""Runs the systems, round by round, and takes medians. Knows nothing of tables and plots."""
import ctypes
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from .rows import BULK, CPU_ROWS, KIB, MIB, NAMES, SMALL, STREAMS, TOTAL, UNDISTURBED

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv/bench"
BASELINES = ROOT / "benches/baselines"
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
# A turn in which others used more than UNDISTURBED cores is measured again, so often at most. The timers of bbr's pacing run outside of
# any process and come to 0.15 cores by themselves.
ATTEMPTS = 3


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run(command, env=None, timeout=180):
    """Runs a command; its output and what it used. Fails loudly."""
    merged = {**os.environ, **(env or {})}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(c) for c in command], env=merged, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_parent
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout, used


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def clock_of(pid):
    return time.clock_gettime((~pid << 3) | 2)


class Watch:
    """How much of the machine others used meanwhile: everything the cores did, less what processes of this run did."""

    def __init__(self):
        self.began, self.busy, self.own = time.monotonic(), *self.sample()

    @staticmethod
    def sample():
        # user, nice, system, idle, iowait, irq, softirq, steal: time that the hypervisor took away disturbs as well.
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return busy, sum(u.ru_utime + u.ru_stime for u in used)

    def others(self):
        """Cores that others used on average."""
        busy, own = self.sample()
        return max(0.0, ((busy - self.busy) - (own - self.own)) / (time.monotonic() - self.began))


# ---- systems: each measures one round and returns rows ----


class Ours:
    def __init__(self, perf, cost, seconds, quick):
        self.perf, self.cost, self.seconds, self.quick = perf, cost, seconds, quick

    def environment(self, congestion):
        env = {"UCCL_TCPX_PLUGIN": "soft", "UCCL_P2P_LOG_LEVEL": "error", "NCCL_SOCKET_IFNAME": "lo", "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "lo"}
        if congestion:
            env["UCCL_TCPX_SOFT_CONGESTION"] = congestion
        return env

    def client(self, address, env, row, iters, verify, wait=False):
        op, total, block = row
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            command = [self.perf, "client", address, "--op", op, "--total", total, "--block", block, "--json", out.name]
            command += ["--verify"] * verify + ["--wait"] * wait
            command += ["--iters", iters] if iters else []
            _, used = run(command, env)
            measured = json.load(open(out.name))[0]
            # The other systems report the rate of their median iteration.
            return {**measured, "gbytes_per_s": measured["gbytes_per_s_median"]}, used

    def round(self, congestion):
        rows = self.session(congestion, BULK + SMALL, cpu=True)
        # An application that blocks until the end, instead of polling on a core that the data needs too.
        rows += [{**row, "variant": "waiting"} for row in self.session(congestion, BULK[:2], cpu=False, wait=True)]
        # The library's own choice of congestion control.
        rows += [{**row, "variant": "own choice"} for row in self.session(None, BULK[:2], cpu=False, wait=True)]
        notify = json_lines(run([self.cost, "notify", "--seconds", self.seconds], self.environment(congestion))[0])[0]
        return rows + [{"op": "notify", "total_bytes": 0, "block_bytes": 0, "p50_us": notify["p50_us"], "p99_us": notify["p99_us"]}]

    def session(self, congestion, wanted, cpu, wait=False):
        env = self.environment(congestion)
        server = subprocess.Popen(
            [self.perf, "server"], env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent
        )
        try:
            address = server.stdout.readline().strip()
            rows = []
            for row in wanted:
                # Without --quick tcpx-perf fills about a second by itself.
                iters = None if not self.quick else 15 if row[1] > MIB else 4000
                rows.append(self.client(address, env, row, iters, verify=True, wait=wait)[0])
            for row in CPU_ROWS if cpu else []:
                # Setting up costs the same in a short and a long run: the difference is what moving costs.
                short, long = 2, 12 if self.quick else 42
                spent = []
                for iters in (short, long):
                    before = clock_of(server.pid)
                    _, used = self.client(address, env, row, iters, verify=False)
                    spent.append(used + clock_of(server.pid) - before)
                for measured in rows:
                    if (measured["op"], measured["total_bytes"], measured["block_bytes"]) == row:
                        measured["cpu_s_per_gib"] = (spent[1] - spent[0]) * 2**30 / (row[1] * (long - short))
            return rows
        finally:
            server.terminate()
            server.wait(10)


class Raw:
    def __init__(self, seconds):
        self.seconds, self.program = seconds, VENV / "raw_tcp"

    def round(self, congestion):
        rows = []
        for streams in STREAMS:
            rows += json_lines(run([self.program, "streams", streams, TOTAL, self.seconds])[0])
        for spin in (1, 0):
            rows += json_lines(run([self.program, "pingpong", 4 * KIB, spin, self.seconds])[0])
        return rows


class Baseline:
    def __init__(self, program, seconds, notify, env, totals):
        self.program, self.seconds, self.env, self.totals = BASELINES / program, seconds, env, totals
        self.notify = ["notify"] if notify else []

    def round(self, congestion):
        words = [f"{op.upper()}:{self.totals.get(block, total) if total > block else total}:{block}" for op, total, block in BULK + SMALL]
        return json_lines(run([VENV / "bin/python", self.program, self.seconds, *words, *self.notify], self.env)[0])


# ---- medians ----


def key_of(row):
    if "kind" in row:
        return f"{row['kind']} {row['streams']}"
    if row["op"] == "notify":
        return "notify"
    key = f"{row['op']} {row['total_bytes']} {row['block_bytes']}"
    return f"{key} {row['variant']}" if "variant" in row else key


def medians(rounds):
    """Rows of all rounds of one system -> one row a key, each figure the median over the rounds, with the range of the rates."""
    by_key = {}
    for row in (row for rows in rounds for row in rows):
        by_key.setdefault(key_of(row), []).append(row)
    result = {}
    for key, rows in by_key.items():
        merged = dict(rows[0])
        for figure in ("p50_us", "p99_us", "gbytes_per_s", "cpu_s_per_gib"):
            values = [row[figure] for row in rows if figure in row]
            if values:
                merged[figure] = statistics.median(values)
                merged[f"{figure}_rounds"] = values
        if "verified" in merged:
            merged["verified"] = all(row["verified"] for row in rows)
        result[key] = merged
    return result


# ---- the run ----


def machine():
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()).group(1))
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "kernel": platform.release(),
        "congestion_control": CONGESTION.read_text().strip(),
        "mtu_loopback": int(Path("/sys/class/net/lo/mtu").read_text()),
        **{name: Path(f"/proc/sys/net/{path}").read_text().split() for name, path in (("tcp_wmem", "ipv4/tcp_wmem"), ("tcp_rmem", "ipv4/tcp_rmem"))},
    }


def build():
    env = dict(os.environ)
    target = Path(env.get("CARGO_TARGET_DIR", ROOT / "target"))
    quiet = {"cwd": ROOT, "check": True, "text": True, "stdout": subprocess.PIPE}
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "tcpx-tools", "--bin", "tcpx-perf"], **quiet)
    messages = subprocess.run(["cargo", "bench", "--quiet", "--no-run", "-p", "uccl-tcpx", "--bench", "cost", "--message-format=json"], **quiet)
    made = [json.loads(line) for line in messages.stdout.splitlines() if line.startswith("{")]
    cost = next(m["executable"] for m in made if m.get("executable") and m["target"]["name"] == "cost")
    return target / "release/tcpx-perf", Path(cost)


def measure(systems, congestion_controls, rounds):
    results, started = {}, time.monotonic()
    dropped, disturbed = {}, []
    spare = 2 * len(systems)  # turns that may be measured again in all, so that a busy machine does not make the run endless
    for congestion in congestion_controls:
        if congestion != CONGESTION.read_text().strip():
            CONGESTION.write_text(congestion)
        samples = {name: [] for name in systems}
        for n in range(rounds):
            # Each round begins with another system, so that none is always the one that comes first.
            names = list(systems)
            names = names[n % len(names) :] + names[: n % len(names)]
            for name in names:
                if name in dropped:
                    continue
                try:
                    for attempt in range(ATTEMPTS):
                        spare -= attempt > 0
                        watch = Watch()
                        rows = systems[name].round(congestion)
                        others = watch.others()
                        if others <= UNDISTURBED or spare == 0:
                            break
                        print(f"{congestion}: {NAMES[name]}: others used {others:.2f} cores meanwhile", flush=True)
                    samples[name].append(rows)
                    disturbed += [{"congestion": congestion, "round": n + 1, "system": name, "cores": round(others, 2)}] if others > UNDISTURBED else []
                except (RuntimeError, subprocess.TimeoutExpired) as e:
                    if name in ("ours", "raw"):
                        raise
                    dropped[name] = str(e)
                    print(f"left out from here on: {NAMES[name]}: {e}", flush=True)
            print(f"{congestion}: round {n + 1} of {rounds}, {time.monotonic() - started:.0f} s", flush=True)
        results[congestion] = {name: medians(rows) for name, rows in samples.items() if rows}
    return results, dropped, disturbed
