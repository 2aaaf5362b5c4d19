"""Recovery of the NIXL backend TCPX: agents in two network namespaces, the link between them goes down, or one NIC of two,
the peer is stopped, dies, comes back as another instance. Needs root. Run it with run.sh: NIXL_TEST=test_nixl_recovery.py NIXL_JOBS=8."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import harness
from harness import RemoteNode, Skip, case, check, check_equal

MIB = 1 << 20
LOST = "nixlRemoteDisconnectError"
# Work posted while there is no connection ends within the transfer deadline; the rest is for a busy machine.
PATIENCE_S = 10 + 15


def shell(*words):
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise Skip(f"{' '.join(words)}: {done.stderr.strip()}")


class Link:
    """Two network namespaces joined by a veth pair, eth0. `nics`: further pairs eth1, eth2, ... for the data, of `mbit` each; eth0 then carries
    the control connection alone."""

    def __init__(self, nics=0, mbit=None):
        if os.geteuid() != 0:
            raise Skip("network namespaces need root")
        mark = f"{os.getpid()}"
        self.names = [f"nx-{side}-{mark}" for side in "ab"]
        self.data = [f"eth{i}" for i in range(1, nics + 1)]
        try:
            for name in self.names:
                shell("ip", "netns", "add", name)
                shell("ip", "-n", name, "link", "set", "lo", "up")
            for i in range(nics + 1):
                ends = [f"nx{side}{i}-{mark}" for side in "ab"]
                shell("ip", "link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", "name", ends[1], "netns", self.names[1])
                for name, end, host in zip(self.names, ends, (1, 2)):
                    shell("ip", "-n", name, "link", "set", end, "name", f"eth{i}")
                    shell("ip", "-n", name, "addr", "add", f"10.88.{i}.{host}/24", "dev", f"eth{i}")
                    shell("ip", "-n", name, "link", "set", f"eth{i}", "up")
                    if i > 0:
                        shell("tc", "-n", name, "qdisc", "add", "dev", f"eth{i}", "root", "tbf", "rate", f"{mbit}mbit", "burst", "256k", "latency", "20ms")
            for device in ["eth0", *self.data]:
                self.wait_for_carrier(device)
        except BaseException:
            self.remove()
            raise

    def wait_for_carrier(self, device="eth0"):
        """Waits for the carrier: the kernel reports it a moment later, and the library uses no interface without one."""
        deadline = time.monotonic() + 10
        for name in self.names:
            while "state UP" not in subprocess.run(["ip", "-n", name, "link", "show", "dev", device], capture_output=True, text=True).stdout:
                check(time.monotonic() < deadline, "the veth pair did not come up")
                time.sleep(0.02)

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def silence(self, on, device="eth0"):
        """Everything that arrives at the second host is dropped silently."""
        for chain in ("INPUT", "OUTPUT"):
            shell("ip", "netns", "exec", self.names[1], "iptables", "-A" if on else "-D", chain, "-i" if chain == "INPUT" else "-o", device, "-j", "DROP")

    def unplug(self, on, device="eth0"):
        """The interface of the second host goes down, and the first one loses its carrier."""
        shell("ip", "-n", self.names[1], "link", "set", device, "down" if on else "up")

    def carried(self, device):
        """Bytes that the first host's interface has sent and received."""
        files = [f"/sys/class/net/{device}/statistics/{way}_bytes" for way in ("tx", "rx")]
        done = subprocess.run(["ip", "netns", "exec", self.names[0], "cat", *files], capture_output=True, text=True, check=True)
        return sum(int(number) for number in done.stdout.split())

    def node(self, side, name, **keywords):
        data = ",".join(self.data) or "eth0"
        variables = {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": data, "UCCL_SOCKET_IFNAME": "eth0"}
        return RemoteNode(environment=variables, namespace=self.names[side], name=name, **keywords)


class Pair:
    """An agent at each end of a link, with a buffer each. `cut` and `mend` break and restore the link."""

    def __init__(self, size=8 * MIB, **link):
        self.size = size
        self.link, self.nodes = Link(**link), []
        try:
            self.here, self.there = self.start("here"), self.start("there")
            self.here.allocate("data", size, 1)
            self.remote = self.there.allocate("data", size, 2)
            self.meet()
        except BaseException:
            self.end()
            raise

    def start(self, name):
        self.nodes.append(self.link.node(len(self.nodes), name))
        return self.nodes[-1]

    def meet(self):
        self.here.connect(self.there.metadata())
        self.there.connect(self.here.metadata())

    def blocks(self, size=None):
        base, device = self.remote
        return [(base, size or self.size, device)]

    def move(self, operation, size=None, message=b""):
        """One transfer. The state it ends with; an agent that has dropped its peer by itself gets the same metadata again first."""
        self.here.start("try_move", operation, "data", [(0, size or self.size)], self.blocks(size), "there", message)
        state = self.here.result(PATIENCE_S + 60)
        if state == "nixlNotFoundError":
            print("note: this version of NIXL drops a lost peer by itself")
            self.here.connect(self.there_metadata)
            return self.move(operation, size, message)
        return state

    def end(self):
        for node in self.nodes:
            node.kill()
        self.link.remove()


def with_pair(function, **keywords):
    pair = Pair(**keywords)
    try:
        pair.there_metadata = pair.there.metadata()
        function(pair)
    finally:
        pair.end()


def all_well(pair, seed, reads=6):
    """Checks that reads, writes and notifications succeed in both directions."""
    pair.there.fill("data", seed)
    for turn in range(reads):
        check_equal(pair.move("READ"), "DONE", f"read {turn} after the recovery")
        check(pair.here.matches("data", seed), "bytes read differ")
    pair.here.fill("data", seed + 1)
    check_equal(pair.move("WRITE", message=b"well %d" % seed), "DONE", "write after the recovery")
    check(pair.there.matches("data", seed + 1), "bytes written differ")
    check_equal(pair.there.notifications(1), [("here", b"well %d" % seed)], "notification after the recovery")
    answer_in_time(pair, b"answer %d" % seed)


def answer_in_time(pair, message):
    """The other direction has its own connection, which may come back a moment later."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            pair.there.notify("here", message)
            break
        except RuntimeError as error:
            check(time.monotonic() < deadline, f"the other direction did not come back: {error}")
            if "NotFound" in str(error):
                pair.there.connect(pair.here.metadata())
            time.sleep(0.5)
    check_equal(pair.here.notifications(1), [("there", message)], "answer")


def idle(cut, seconds=25):
    def run(pair):
        check_equal(pair.move("READ"), "DONE", "read before")
        change = getattr(pair.link, cut)
        change(True)
        time.sleep(seconds)
        change(False)
        all_well(pair, 10)

    with_pair(run)


def busy(cut, seconds=25):
    def run(pair):
        check_equal(pair.move("READ"), "DONE", "read before")
        change = getattr(pair.link, cut)
        # In flight when the link goes: many reads one after the other until one fails.
        pair.here.start("move_until", "READ", "data", [(0, pair.size)], pair.blocks(), "there", PATIENCE_S)
        time.sleep(1)
        down = time.monotonic()
        change(True)
        state, good = pair.here.result(PATIENCE_S + 60)
        failed = time.monotonic() - down
        print(f"note: {good} reads, then {state} {failed:.1f} s after the link went down")
        check_equal(state, LOST, "the transfer in flight")
        # Failed transfers are not carried out later.
        pair.here.fill("data", 99)
        posted = time.monotonic()
        state = pair.move("READ", 4096)
        print(f"note: a read posted without a link: {state} after {time.monotonic() - posted:.1f} s")
        check(state == LOST, f"a read posted without a link: {state}")
        check(pair.here.matches("data", 99), "a failed read wrote to memory afterwards")
        time.sleep(max(0, down + seconds - time.monotonic()))
        change(False)
        all_well(pair, 20)

    with_pair(run)


@case(timeout=180)
def silent_link_while_idle():
    idle("silence")


@case(timeout=180)
def silent_link_while_busy():
    busy("silence")


@case(timeout=180)
def unplugged_link_while_idle():
    idle("unplug")


@case(timeout=180)
def unplugged_link_while_busy():
    busy("unplug")


def lost_nic(cut):
    """One of two NICs is lost in the middle of a transfer, and comes back later."""

    def run(pair):
        change, nic = getattr(pair.link, cut), "eth2"
        check_equal(pair.move("READ", MIB), "DONE", "read before")

        @contextlib.contextmanager
        def moving(what, operation, seed, size):
            source, target = (pair.there, pair.here) if operation == "READ" else (pair.here, pair.there)
            source.fill("data", seed, size)
            before, begin = pair.link.carried(nic), time.monotonic()
            pair.here.start("try_move", operation, "data", [(0, size)], pair.blocks(size), "there", b"")
            yield before
            check_equal(pair.here.result(PATIENCE_S + 60), "DONE", f"{operation} {what}")
            print(f"note: {operation} {what}: {time.monotonic() - begin:.1f} s", flush=True)
            check(target.matches("data", seed, size=size), f"{operation} {what}: bytes differ")

        for seed, operation in ((100, "WRITE"), (200, "READ")):
            with moving("in flight as a NIC is lost", operation, seed, pair.size) as before:
                deadline = time.monotonic() + 20
                while pair.link.carried(nic) - before < pair.size // 8:
                    check(time.monotonic() < deadline, f"{nic} carries nothing")
                    time.sleep(0.02)
                change(True, nic)
            with moving("without the NIC", operation, seed + 1, 32 * MIB):
                pass
            change(False, nic)
            # An interface that comes back is used soon, a silent one after the next attempt.
            time.sleep(5)
            with moving("after the NIC is back", operation, seed + 2, 64 * MIB) as before:
                pass
            carried = pair.link.carried(nic) - before
            print(f"note: {operation}: {nic} is back with {100 * carried // (64 * MIB)} % of the next transfer")
            check(carried > 8 * MIB, f"{operation}: {nic} carried {carried} bytes of 64 MiB after it was back")
        check_equal(pair.move("WRITE", MIB, b"well"), "DONE", "write with a notification")
        check_equal(pair.there.notifications(1), [("here", b"well")], "its notification")
        answer_in_time(pair, b"answer")

    with_pair(run, size=256 * MIB, nics=2, mbit=600)


@case(timeout=300)
def unplugged_nic_costs_no_transfer():
    lost_nic("unplug")


@case(timeout=300)
def silent_nic_costs_no_transfer():
    lost_nic("silence")


@case(timeout=180)
def work_posted_without_a_link_is_done_when_it_returns():
    def run(pair):
        check_equal(pair.move("READ"), "DONE", "read before")
        pair.link.silence(True)
        time.sleep(13)  # the connection is lost by now
        pair.there.fill("data", 30)
        pair.here.start("try_move", "READ", "data", [(0, pair.size)], pair.blocks(), "there", b"late")
        time.sleep(3)
        pair.link.silence(False)
        check_equal(pair.here.result(PATIENCE_S + 60), "DONE", "read posted without a link")
        check(pair.here.matches("data", 30), "bytes read differ")
        check_equal(pair.there.notifications(1), [("here", b"late")], "its notification")

    with_pair(run)


def stopped(busy_too):
    def run(pair):
        check_equal(pair.move("READ"), "DONE", "read before")
        if busy_too:
            pair.here.start("move_until", "READ", "data", [(0, pair.size)], pair.blocks(), "there", PATIENCE_S)
            time.sleep(1)
        pair.there.signal(signal.SIGSTOP)
        begin = time.monotonic()
        if busy_too:
            state, _ = pair.here.result(PATIENCE_S + 60)
            check_equal(state, LOST, "the transfer in flight")
        time.sleep(max(0, begin + 15 - time.monotonic()))
        pair.there.signal(signal.SIGCONT)
        all_well(pair, 40)

    with_pair(run)


@case(timeout=180)
def peer_stands_still_for_15_s_while_idle():
    stopped(False)


@case(timeout=180)
def peer_stands_still_for_15_s_while_busy():
    stopped(True)


@case(timeout=120)
def many_short_outages():
    def run(pair):
        check_equal(pair.move("READ"), "DONE", "read before")
        # Shorter than every deadline: TCP recovers, and no transfer fails.
        for _ in range(5):
            pair.link.silence(True)
            time.sleep(random.uniform(0.2, 1.5))
            pair.link.silence(False)
            check_equal(pair.move("READ", 4096), "DONE", "read after a short outage")
        all_well(pair, 50, 2)

    with_pair(run)


@case(timeout=120)
def another_instance_is_refused_until_its_metadata_is_loaded():
    link = Link()
    here = there = None
    try:
        here = link.node(0, "here")
        here.allocate("data", MIB, 1)
        there = link.node(1, "there", params={"port": "7777"})
        remote = there.allocate("data", MIB, 2)
        here.connect(there.metadata())
        blocks = [(remote[0], MIB, remote[1])]
        check_equal(here.try_move("READ", "data", [(0, MIB)], blocks, "there", b""), "DONE", "read")
        here.prepare_as("old", "WRITE", "data", [(0, MIB)], blocks, "there")
        there.kill()
        there = link.node(1, "there", params={"port": "7777"})
        remote = there.allocate("data", MIB, 3)
        # The plugin finds the new instance in the background; whatever is posted before and after must not reach it.
        for turn in range(4):
            state = here.post_as("old")
            check(state in (LOST, "nixlNotFoundError"), f"old metadata, try {turn}: {state}")
            time.sleep(0.7)
        try:
            here.notify("there", b"for the old one")
            raise harness.Failure("a notification for an instance that has ended was accepted")
        except RuntimeError:
            pass
        check(there.matches("data", 3), "the new instance's memory was written with old metadata")
        try:
            here.forget("there")
        except RuntimeError:
            pass
        here.connect(there.metadata())
        blocks = [(remote[0], MIB, remote[1])]
        check_equal(here.try_move("READ", "data", [(0, MIB)], blocks, "there", b"new"), "DONE", "read with new metadata")
        check(here.matches("data", 3), "bytes read differ")
        check_equal(there.notifications(1), [("here", b"new")], "notifications of the new instance")
    finally:
        for node in (here, there):
            if node:
                node.kill()
        link.remove()


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
