"""The NIXL backend TCPX between two GPUs, and its bandwidth beside UCX over TCP. Needs two GPUs, torch and a nixl-cuNN wheel:
NIXL_PYTHON=python3 NIXL_CUDA=13 NIXL_TEST=test_nixl_vram.py tests/nixl/run.sh LIBDIR PLUGINDIR"""

import signal
import sys
import time

import numpy as np

import harness
from harness import Node, RemoteNode, Skip, at, case, check, check_equal, joined, pattern

MIB = 1 << 20
SHORT = {"UCCL_TCPX_PEER_TIMEOUT_MS": 2000, "UCCL_TCPX_TRANSFER_TIMEOUT_MS": 2000}
DEADLINE_S = 2.0 + 3.0


def need_gpus():
    try:
        import torch
    except ImportError:
        raise Skip("torch is not installed") from None
    if torch.cuda.device_count() < 2:
        raise Skip(f"two GPUs are needed, {torch.cuda.device_count()} found")


def pair(size, mine_seed=None, theirs_seed=None):
    """As the harness's pair, here on GPU 0 and the other process on GPU 1."""
    need_gpus()
    return joined(Node("here", buffers="gpu", device=0), RemoteNode(name="there", buffers="gpu", device=1), size, mine_seed, theirs_seed)


def move_unaligned(operation):
    size, offset, remote_offset = 64 * MIB + 3, 5, 11
    total = size + 64
    here, there, remote = pair(total, 1, 2)
    for _ in range(3):
        state = here.move(operation, "data", [(offset, size)], at(remote, [(remote_offset, size)]), "there")
        check_equal(state, "DONE", operation)
    node, seed, target, source, old = (there, 1, remote_offset, offset, 2) if operation == "WRITE" else (here, 2, offset, remote_offset, 1)
    check(node.matches("data", seed, target, source, size), "data differs")
    check(node.matches("data", old, 0, 0, target), "bytes before the target were changed")
    check(node.matches("data", old, target + size, target + size, total - target - size), "bytes after the target were changed")
    there.close()


@case(timeout=180)
def vram_write_64_mib_unaligned():
    move_unaligned("WRITE")


@case(timeout=180)
def vram_read_64_mib_unaligned():
    move_unaligned("READ")


@case(timeout=180)
def vram_scattered_4096_descriptors():
    count, block = 4096, 4096
    here, there, remote = pair(count * block + 1, 1, 2)
    order = np.random.default_rng(3).permutation(count)
    mine = [(1 + i * block, block) for i in range(count)]
    theirs = at(remote, [(int(p) * block, block) for p in order])
    check_equal(here.move("WRITE", "data", mine, theirs, "there"), "DONE", "write")
    source = pattern(1, count * block + 1)[1:].reshape(count, block)
    expected = np.empty_like(source)
    expected[order] = source
    check(there.get("data", 0, count * block) == expected.tobytes(), "written blocks differ")
    there.fill("data", 5)
    check_equal(here.move("READ", "data", mine, theirs, "there"), "DONE", "read")
    source = pattern(5, count * block + 1)[:-1].reshape(count, block)
    check(here.get("data", 1, count * block) == source[order].tobytes(), "read blocks differ")
    there.close()


@case(timeout=180)
def vram_notification_after_the_data_of_its_transfer():
    size = 8 * MIB
    here, there, remote = pair(size, 1)
    for turn, length in enumerate([1, 256, 1000, MIB]):
        message = pattern(100 + turn, length).tobytes()
        here.fill("data", turn)
        there.start("notifications", 1)
        check_equal(here.move("WRITE", "data", [(0, size)], at(remote, [(0, size)]), "there", message), "DONE", "write")
        check(there.result() == [("here", message)], f"notification of {length} bytes")
        check(there.matches("data", turn), "the notification overtook the data")
    there.close()


@case(timeout=180)
def vram_written_by_kernels_and_read_by_kernels():
    size = 32 * MIB
    here, there, remote = pair(size)
    for value in range(1, 8):
        there.compute("data", value)
        check_equal(here.move("READ", "data", [(0, size)], at(remote, [(0, size)]), "there"), "DONE", "read")
        check(here.all_equal("data", value), f"a kernel launched after the read saw old data, value {value}")
        here.compute("data", 100 + value)
        check_equal(here.move("WRITE", "data", [(0, size)], at(remote, [(0, size)]), "there"), "DONE", "write")
        check(there.all_equal("data", 100 + value), f"a kernel launched after the write saw old data, value {value}")
    there.close()


@case(timeout=180)
def vram_and_host_memory_mixed():
    size = 4 * MIB
    here, there, _ = pair(64)
    here.allocate("host", size, 1, kind="host")
    target = there.allocate("gpu", size, 2)
    here.forget("there")
    here.connect(there.metadata())
    blocks = [(3, size - 3)]
    state = here.run("WRITE", here.local("host", blocks), at(target, [(1, size - 3)]), "there", kinds=("DRAM", "VRAM"))
    check_equal(state, "DONE", "host to GPU")
    check(there.matches("gpu", 1, 1, 3, size - 3), "data differs")
    there.fill("gpu", 9)
    state = here.run("READ", here.local("host", [(0, size)]), at(target, [(0, size)]), "there", kinds=("DRAM", "VRAM"))
    check_equal(state, "DONE", "GPU to host")
    check(here.matches("host", 9), "data differs")
    there.close()


@case(timeout=180)
def vram_two_agents_in_one_process():
    need_gpus()
    size = 16 * MIB
    one, two = Node("one", buffers="gpu", device=0), Node("two", buffers="gpu", device=1)
    one.allocate("data", size, 1)
    target = two.allocate("data", size, 2)
    one.connect(two.metadata())
    check_equal(one.move("WRITE", "data", [(0, size)], at(target, [(0, size)]), "two", b"done"), "DONE", "write")
    check(two.matches("data", 1), "data differs")
    check_equal(two.notifications(1), [("one", b"done")], "notification")


@case(timeout=180)
def vram_agent_to_itself():
    need_gpus()
    node = Node("alone", buffers="gpu", device=0)
    size = 16 * MIB
    node.allocate("a", size, 1)
    target = node.allocate("b", size, 2)
    check_equal(node.move("WRITE", "a", [(3, size - 3)], at(target, [(1, size - 3)]), "alone"), "DONE", "write")
    check(node.matches("b", 1, 1, 3, size - 3), "data differs")


@case(timeout=180, **SHORT)
def vram_peer_killed_and_started_again():
    size = 512 * MIB
    here, there, remote = pair(size, 1)
    check_equal(here.move("WRITE", "data", [(0, size)], at(remote, [(0, size)]), "there"), "DONE", "first write")
    handles = [here.prepare("WRITE", here.local("data", [(0, size)]), at(remote, [(0, size)]), "there") for _ in range(4)]
    for handle in handles:
        check_equal(here.post(handle), "PROC", "post")
    # At once: copies on one host take milliseconds.
    there.signal(signal.SIGKILL)
    begin = time.monotonic()
    states = [here.finish(handle) for handle in handles]
    seconds = time.monotonic() - begin
    check("nixlRemoteDisconnectError" in states, f"states {states}")
    check("TIMEOUT" not in states and seconds < DEADLINE_S, f"states {states} after {seconds:.1f} s")
    for handle in handles:
        try:
            handle.release()
        except Exception:
            handle.release()
    there.process.join()
    there = RemoteNode(name="there", buffers="gpu", device=1)
    remote = there.allocate("data", MIB)
    try:
        here.forget("there")
    except Exception:
        pass
    here.connect(there.metadata())
    check_equal(here.move("WRITE", "data", [(0, MIB)], at(remote, [(0, MIB)]), "there"), "DONE", "write to the new peer")
    check(there.matches("data", 1, 0, 0, MIB), "data differs")
    there.close()


@case(timeout=600, UCCL_TCPX_SOFT_STRICT=0)
def vram_bandwidth_beside_ucx():
    need_gpus()
    shapes = [  # total, block, operation, iterations
        (64 * MIB, 64 * MIB, "WRITE", 10),
        (64 * MIB, 64 * MIB, "READ", 10),
        (64 * MIB, MIB, "WRITE", 5),
        (64 * MIB, 32 << 10, "WRITE", 5),
        (64 * MIB, 4 << 10, "WRITE", 3),
        (4096, 4096, "WRITE", 50),
        (4096, 4096, "READ", 50),
    ]
    environments = {
        "TCPX": {},
        # UCX comes from the wheel's own plugin directory, and over TCP: what a cluster without RDMA has.
        "UCX": {"NIXL_PLUGIN_DIR": None, "UCX_TLS": "tcp,cuda_copy"},
    }
    for backend, environment in environments.items():
        nodes = [RemoteNode(environment, name=f"n{d}", backend=backend, buffers="gpu", device=d) for d in (0, 1)]
        nodes[0].allocate("data", 64 * MIB, 1)
        remote = nodes[1].allocate("data", 64 * MIB, 2)
        nodes[0].connect(nodes[1].metadata())
        for total, block, operation, iterations in shapes:
            count = total // block
            order = np.random.default_rng(1).permutation(count)
            blocks = [(i * block, block) for i in range(count)]
            targets = at(remote, [(int(p) * block, block) for p in order])
            nodes[0].start("benchmark", operation, "data", blocks, targets, "n1", iterations)
            while not nodes[0].pipe.poll(0.002):
                nodes[1].notifications(1, 0.001)  # UCX needs the target's application to make progress
            seconds = nodes[0].result()
            print(f"note: {backend:4s} {operation:5s} {total >> 10} KiB in {count} blocks: {seconds * 1e6:.0f} us, {total / seconds / 1e9:.2f} GB/s")
        for node in nodes:
            node.close()


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
