"""NIXL with a backend (UCX by default) between two processes over loopback, DRAM to DRAM.

usage: nixl_dram.py SECONDS ROW...      BACKEND=UCX, UCX_TLS=tcp, PROGRESS_THREAD=0
"""
import os
import sys

os.environ.setdefault("UCX_TLS", "tcp")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
import common  # noqa: E402
import numpy as np  # noqa: E402

BACKEND = os.environ.get("BACKEND", "UCX")
# Without the thread both sides poll, which is what NIXL does fastest on two cores: its spinning threads take none from the data.
PROGRESS_THREAD = os.environ.get("PROGRESS_THREAD", "0") == "1"
# Left alone, both ends sometimes poll on the same core for a whole row, and an operation takes 8 ms. Such a row is measured again with
# each end on a core of its own; not every row, since that costs rate and p99 elsewhere.
CORES = sorted(os.sched_getaffinity(0))
SHARED_CORE_SECONDS = 1e-3


def separate(target_pid, on):
    for pid, core in ((os.getpid(), CORES[0]), (target_pid, CORES[-1])):
        os.sched_setaffinity(pid, {core} if on else CORES)


def agent(name):
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=PROGRESS_THREAD, backends=[BACKEND]))


def buffer(total, fill):
    return np.full(max(total, 4096), fill, dtype=np.uint8)


def initiator(pipe, seconds, rows):
    me = agent("initiator")
    target_pid = pipe.recv()
    for op, total, block in rows:
        memory = buffer(total, 1)
        base = memory.ctypes.data
        registration = me.register_memory([(base, memory.nbytes, 0, "")], "DRAM")
        pipe.send((op, total, me.get_agent_metadata()))
        metadata, remote = pipe.recv()
        peer = me.add_remote_agent(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        if op == "notify":
            # The first message makes the connection.
            def once():
                me.send_notif(peer, b"ping")
                while not me.get_new_notifs():
                    pass

            handle = None
        else:
            count = total // block
            order = np.random.default_rng(1).permutation(count)
            local = me.get_xfer_descs([(base + i * block, block, 0) for i in range(count)], "DRAM")
            there = me.get_xfer_descs([(remote + int(p) * block, block, 0) for p in order], "DRAM")
            handle = me.initialize_xfer(op, local, there, peer, b"")

            def once():
                state = me.transfer(handle)
                while state != "DONE":
                    if state == "ERR":
                        raise SystemExit("the transfer failed")
                    state = me.check_xfer_state(handle)

        times, used = common.timed(once, seconds, target_pid)
        if total <= 4096 and common.percentile(times, 50) > SHARED_CORE_SECONDS:
            separate(target_pid, True)
            times, used = common.timed(once, seconds, target_pid)
            separate(target_pid, False)
        common.report(op.lower(), total, block, times, used)
        if handle is not None:
            me.release_xfer_handle(handle)
        pipe.send("next")
        pipe.recv()
        me.remove_remote_agent(peer)
        me.deregister_memory(registration)
    pipe.send(None)
    sys.stdout.flush()
    os._exit(0)


def target(pipe, seconds, rows):
    me = agent("target")
    pipe.send(os.getpid())
    while (message := pipe.recv()) is not None:
        op, total, metadata = message
        memory = buffer(total, 0)
        registration = me.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        peer = me.add_remote_agent(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        pipe.send((me.get_agent_metadata(), memory.ctypes.data))
        # Asking for notifications is what drives progress here.
        while not pipe.poll(0):
            for _ in range(100):
                for messages in me.get_new_notifs().values():
                    for _ in messages:
                        me.send_notif(peer, b"pong")
        pipe.recv()
        me.remove_remote_agent(peer)
        me.deregister_memory(registration)
        pipe.send("done")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(not common.run_pair(target, initiator, float(sys.argv[1]), common.parse_rows(sys.argv[2:])))
