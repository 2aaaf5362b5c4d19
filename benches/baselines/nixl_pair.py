"""NIXL between two processes over loopback, for nixl_dram.py and nixl_vram.py, which say what memory is: an object with

    kind                          "DRAM" or "VRAM"
    buffer(side, total, value)    an object with address, nbytes, device and all_equal(value, end, start=0); side is 0 for the initiator

    BACKEND=UCX, PROGRESS_THREAD=0, NIXL_PACKAGE=nixl (nixl_cu12, nixl_cu13: where several are installed)

Beside WRITE and READ there is the operation BOTH: a WRITE of the first half and a READ of the second, posted together.
"""
import importlib
import os
import sys
import time

import common
import numpy as np

BACKEND = os.environ.get("BACKEND", "UCX")
# Without the thread both processes poll, which is fastest on two cores: no spinning thread takes a core from the data.
PROGRESS_THREAD = os.environ.get("PROGRESS_THREAD", "0") == "1"
# Sometimes the scheduler lets both ends poll on the same core for a whole row, and an operation takes 8 ms. Such a row is measured again
# with each end on its own core; not every row, since that costs rate and p99 elsewhere.
CORES = sorted(os.sched_getaffinity(0))
SHARED_CORE_SECONDS = 1e-3
# Initial contents of the buffers: each row ends with a check of where the bytes went.
MINE, THEIRS = 1, 2


def separate(target_pid, on):
    for pid, core in ((os.getpid(), CORES[0]), (target_pid, CORES[-1])):
        os.sched_setaffinity(pid, {core} if on else CORES)


def agent(name):
    api = importlib.import_module(os.environ.get("NIXL_PACKAGE", "nixl") + "._api")
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=PROGRESS_THREAD, backends=[BACKEND]))


def register(me, memory, buffer):
    return me.register_memory([(buffer.address, buffer.nbytes, buffer.device, "")], memory.kind)


def meet(me, metadata):
    peer = me.add_remote_agent(metadata)
    return peer.decode() if isinstance(peer, bytes) else peer


def prepare(me, peer, memory, mine, there, op, offset, size, block):
    remote, device = there
    count = size // block
    order = np.random.default_rng(1).permutation(count)
    local = me.get_xfer_descs([(mine.address + offset + i * block, block, mine.device) for i in range(count)], memory.kind)
    far = me.get_xfer_descs([(remote + offset + int(p) * block, block, device) for p in order], memory.kind)
    return me.initialize_xfer(op, local, far, peer, b"")


def initiator(pipe, memory, seconds, rows):
    me = agent("initiator")
    target_pid = pipe.recv()
    for op, total, block in rows:
        mine = memory.buffer(0, total, MINE)
        registration = register(me, memory, mine)
        pipe.send((op, total, me.get_agent_metadata()))
        metadata, remote, device = pipe.recv()
        peer = meet(me, metadata)
        handles, posts = [], []
        if op == "notify":
            # The first message makes the connection.
            def once():
                me.send_notif(peer, b"ping")
                while not me.get_new_notifs():
                    pass

        else:
            handles = [
                prepare(me, peer, memory, mine, (remote, device), kind, offset, size, block)
                for kind, offset, size in ([(op, 0, total)] if op != "BOTH" else [("WRITE", 0, total // 2), ("READ", total // 2, total // 2)])
            ]

            def once():
                began = time.perf_counter()
                left = [handle for handle in handles if me.transfer(handle) != "DONE"]
                posts.append(time.perf_counter() - began)
                while left:
                    states = [me.check_xfer_state(handle) for handle in left]
                    if "ERR" in states:
                        raise SystemExit("the transfer failed")
                    left = [handle for handle, state in zip(left, states) if state != "DONE"]

        times, used = common.timed(once, seconds, target_pid)
        if total <= 4096 and common.percentile(times, 50) > SHARED_CORE_SECONDS:
            separate(target_pid, True)
            times, used = common.timed(once, seconds, target_pid)
            separate(target_pid, False)
        if op == "READ" and not mine.all_equal(THEIRS, total):
            raise SystemExit("other bytes were read")
        if op == "BOTH" and not mine.all_equal(THEIRS, total, total // 2):
            raise SystemExit("other bytes were read")
        for handle in handles:
            me.release_xfer_handle(handle)
        pipe.send("next")
        if pipe.recv() != "right":
            raise SystemExit("other bytes were written")
        common.report(op.lower(), total, block, times, used, posts)
        me.remove_remote_agent(peer)
        me.deregister_memory(registration)
    pipe.send(None)
    sys.stdout.flush()
    os._exit(0)


def target(pipe, memory, seconds, rows):
    me = agent("target")
    pipe.send(os.getpid())
    while (message := pipe.recv()) is not None:
        op, total, metadata = message
        mine = memory.buffer(1, total, THEIRS)
        registration = register(me, memory, mine)
        peer = meet(me, metadata)
        pipe.send((me.get_agent_metadata(), mine.address, mine.device))
        # Asking for notifications is what drives progress here.
        while not pipe.poll(0):
            for _ in range(100):
                for messages in me.get_new_notifs().values():
                    for _ in messages:
                        me.send_notif(peer, b"pong")
        pipe.recv()
        right = mine.all_equal(THEIRS if op == "READ" else MINE, total // 2 if op == "BOTH" else total)
        me.remove_remote_agent(peer)
        me.deregister_memory(registration)
        pipe.send("right" if right else "wrong")
    os._exit(0)


def main(memory, seconds, words):
    sys.exit(not common.run_pair(target, initiator, memory, float(seconds), common.parse_rows(words)))
