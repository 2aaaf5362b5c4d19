"""Mooncake's transfer engine over TCP between two processes over loopback, DRAM to DRAM. It has no notification of its own.

usage: mooncake_dram.py SECONDS ROW...
"""
import os
import sys

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOG_minloglevel", "2")
import common  # noqa: E402
import numpy as np  # noqa: E402


def engine():
    from mooncake.engine import TransferEngine

    it = TransferEngine()
    if it.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("initialize failed")
    return it


def largest(rows):
    return max((total for _, total, _ in rows), default=0) or 4096


def initiator(pipe, seconds, rows):
    me = engine()
    memory = np.full(largest(rows), 1, dtype=np.uint8)
    base = memory.ctypes.data
    assert me.register_memory(base, memory.nbytes) == 0
    target_pid, remote, port = pipe.recv()
    for op, total, block in rows:
        if op == "notify":
            continue
        count = total // block
        order = np.random.default_rng(1).permutation(count)
        here = [base + i * block for i in range(count)]
        there = [remote + int(p) * block for p in order]
        lengths = [block] * count
        move = me.batch_transfer_sync_write if op == "WRITE" else me.batch_transfer_sync_read

        def once():
            if move(f"127.0.0.1:{port}", here, there, lengths) != 0:
                raise SystemExit("the transfer failed")

        times, used = common.timed(once, seconds, target_pid)
        common.report(op.lower(), total, block, times, used)
    pipe.send(None)
    sys.stdout.flush()
    os._exit(0)


def target(pipe, seconds, rows):
    me = engine()
    memory = np.zeros(largest(rows), dtype=np.uint8)
    assert me.register_memory(memory.ctypes.data, memory.nbytes) == 0
    pipe.send((os.getpid(), memory.ctypes.data, me.get_rpc_port()))
    pipe.recv()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(not common.run_pair(target, initiator, float(sys.argv[1]), common.parse_rows(sys.argv[2:])))
