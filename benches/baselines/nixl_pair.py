"""NIXL between two processes over loopback, for nixl_dram.py and nixl_vram.py, which say what memory is: an object with

    kind                          "DRAM" or "VRAM"
    buffer(side, total, value)    an object with address, nbytes, device and all_equal(value, total); side is 0 for the initiator

    BACKEND=UCX, PROGRESS_THREAD=0, NIXL_PACKAGE=nixl (nixl_cu12, nixl_cu13: where several are installed)
"""
import importlib
import os
import sys

import common
import numpy as np

BACKEND = os.environ.get("BACKEND", "UCX")
# Without the thread both sides poll, which is what NIXL does fastest on two cores: its spinning threads take none from the data.
PROGRESS_THREAD = os.environ.get("PROGRESS_THREAD", "0") == "1"
# Left alone, both ends sometimes poll on the same core for a whole row, and an operation takes 8 ms. Such a row is measured again with
# each end on a core of its own; not every row, since that costs rate and p99 elsewhere.
CORES = sorted(os.sched_getaffinity(0))
SHARED_CORE_SECONDS = 1e-3
# What the buffers hold before: each row ends with a look at where the bytes went.
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


def initiator(pipe, memory, seconds, rows):
    me = agent("initiator")
    target_pid = pipe.recv()
    for op, total, block in rows:
        mine = memory.buffer(0, total, MINE)
        registration = register(me, memory, mine)
        pipe.send((op, total, me.get_agent_metadata()))
        metadata, remote, device = pipe.recv()
        peer = meet(me, metadata)
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
            local = me.get_xfer_descs([(mine.address + i * block, block, mine.device) for i in range(count)], memory.kind)
            there = me.get_xfer_descs([(remote + int(p) * block, block, device) for p in order], memory.kind)
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
        if op == "READ" and not mine.all_equal(THEIRS, total):
            raise SystemExit("other bytes were read")
        if handle is not None:
            me.release_xfer_handle(handle)
        pipe.send("next")
        if pipe.recv() != "right":
            raise SystemExit("other bytes were written")
        common.report(op.lower(), total, block, times, used)
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
        right = mine.all_equal(MINE if op == "WRITE" else THEIRS, total)
        me.remove_remote_agent(peer)
        me.deregister_memory(registration)
        pipe.send("right" if right else "wrong")
    os._exit(0)


def main(memory, seconds, words):
    sys.exit(not common.run_pair(target, initiator, memory, float(seconds), common.parse_rows(words)))
