"""The NIXL backend TCPX blocks no caller, and reports errors: releases in flight, silent hosts, floods of
notifications, orderly closes and different keys. Run it with run.sh: NIXL_TEST=test_nixl_blocking.py."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time

import harness
from harness import Failure, Node, RemoteNode, at, case, check, check_equal

MIB = 1 << 20
LOST = "nixlRemoteDisconnectError"
# A caller's thread waits for a second at most; the rest is for a busy machine.
AT_ONCE_S = 1.0 + 1.5


def took(begin, limit, what):
    seconds = time.monotonic() - begin
    print(f"note: {what}: {seconds:.3f} s")
    check(seconds < limit, f"{what} took {seconds:.1f} s")


def raised(call, *args):
    """The name of what a call raises, or None."""
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__
    return None


def pair(size):
    here, there, remote = harness.pair(size, 1, 2)
    return here, there, at(remote, [(0, size)])


def release_stalled(operation):
    size = 64 * MIB
    here, there, remote = pair(size)
    check_equal(here.move(operation, "data", [(0, size)], remote, "there"), "DONE", "first transfer")
    here.fill("data", 3)
    there.signal(signal.SIGSTOP)
    handle = here.prepare(operation, here.local("data", [(0, size)]), remote, "there")
    check_equal(here.post(handle), "PROC", "post")
    check_equal(here.agent.check_xfer_state(handle), "PROC", "state")
    begin = time.monotonic()
    handle.release()
    took(begin, AT_ONCE_S, "release of a stalled " + operation)
    # The deregistration waits, for a bounded time; afterwards only the caller uses the memory.
    begin = time.monotonic()
    here.deregister("data")
    took(begin, 30, "deregistration")
    here.fill("data", 4)
    there.signal(signal.SIGCONT)
    time.sleep(1)
    check(here.matches("data", 4), "memory changed after its deregistration")
    there.kill()


# On one host a read does not need the stopped peer, and is soon done.
@case(timeout=90, UCCL_P2P_DISABLE_IPC=1)
def release_of_a_stalled_read_returns_at_once():
    release_stalled("READ")


@case(timeout=90, UCCL_P2P_DISABLE_IPC=1)
def release_of_a_stalled_write_returns_at_once():
    release_stalled("WRITE")


@case()
def release_in_flight_and_go_on():
    size = 64 * MIB
    here, there, remote = pair(size)
    rounds = 10
    for _ in range(rounds):
        handle = here.prepare("READ", here.local("data", [(0, size)]), remote, "there", b"complete")
        check(here.post(handle, b"complete") in ("PROC", "DONE"), "post")
        handle.release()
    check_equal(here.move("READ", "data", [(0, size)], remote, "there", b"sent"), "DONE", "read afterwards")
    check(here.matches("data", 2), "data differs")
    # NIXL looks at a request before it releases it: on a busy machine one may be complete by then, which its notification says.
    came = []
    while not came or came[-1] == ("here", b"complete"):
        more = there.notifications(1)
        check(more, "the last notification does not come")
        came += more
    check_equal(came[-1], ("here", b"sent"), "the last notification")
    check_equal(came[:-1], [("here", b"complete")] * (len(came) - 1), "other notifications")
    check(len(came) - 1 < rounds, "the notification of every released request was sent")
    here.deregister("data")
    here.fill("data", 9)
    time.sleep(0.3)
    check(here.matches("data", 9), "memory changed after its deregistration")
    there.close()


@case(timeout=120)
def silent_host_does_not_keep_the_caller():
    here, there = Node("here"), RemoteNode(name="there", params={"port": "0"})
    here.allocate("data", MIB, 1)
    base, device = there.allocate("data", MIB, 2)
    metadata = there.metadata()
    # Stopped, it is a host whose kernel accepts and whose program never answers.
    there.signal(signal.SIGSTOP)
    begin = time.monotonic()
    state = raised(here.connect, metadata)
    took(begin, AT_ONCE_S, "add_remote_agent of a silent host")
    check_equal(state, None, "add_remote_agent of a silent host goes on in the background")
    begin = time.monotonic()
    handle = here.prepare("READ", here.local("data", [(0, MIB)]), [(base, MIB, device)], "there")
    check_equal(here.post(handle), "PROC", "post")
    took(begin, AT_ONCE_S, "post")
    begin = time.monotonic()
    here.notify("there", b"kept")
    took(begin, AT_ONCE_S, "send_notif")
    time.sleep(2)
    there.signal(signal.SIGCONT)
    check_equal(here.finish(handle), "DONE", "the read, once the host answers")
    check(here.matches("data", 2), "data differs")
    check_equal(there.notifications(1), [("here", b"kept")], "the notification, once the host answers")
    there.close()


@case(timeout=120, UCCL_TCPX_TRANSFER_TIMEOUT_MS=3000)
def work_for_a_host_that_stays_silent_fails_in_time():
    here, there = Node("here"), RemoteNode(name="there")
    here.allocate("data", MIB, 1)
    base, device = there.allocate("data", MIB, 2)
    metadata = there.metadata()
    there.signal(signal.SIGSTOP)
    here.connect(metadata)
    begin = time.monotonic()
    state = here.move("READ", "data", [(0, MIB)], [(base, MIB, device)], "there")
    took(begin, 3 + 5, "a read")
    check_equal(state, LOST, "a read")
    begin = time.monotonic()
    del here
    gc.collect()
    took(begin, 15, "the end of the agent")
    there.kill()


@case(timeout=120)
def peer_that_takes_no_notifications_blocks_no_other():
    here, there, _ = pair(4096)
    there.signal(signal.SIGSTOP)
    taken = []
    for turn in range(8):
        message = bytes([turn]) * (60 * MIB)
        begin = time.monotonic()
        refused = raised(here.notify, "there", message)
        # 60 MiB are copied and sealed, however busy the machine is.
        took(begin, AT_ONCE_S + 3, f"notification {turn}, {refused or 'taken'}")
        if refused:
            check_equal(refused, "nixlBackendError", "a notification that finds no room")
        else:
            taken.append(("here", message))
    check(2 <= len(taken) < 8, f"{len(taken)} notifications were taken")
    here.notify("there", b"last")
    there.signal(signal.SIGCONT)
    arrived = there.notifications(len(taken) + 1)
    check(arrived == taken + [("here", b"last")], f"arrived: {[(name, len(message)) for name, message in arrived]}")
    there.close()


@case()
def notification_that_is_too_large_is_refused_at_once():
    here, there = Node("here"), RemoteNode(name="there")
    for node in (here, there):
        node.allocate("data", 4096)
    metadata = there.metadata()
    largest = b"x" * (64 * MIB - len("here"))
    there.signal(signal.SIGSTOP)
    here.connect(metadata)
    # It is the same before there is a connection.
    check_equal(raised(here.notify, "there", largest + b"x"), "nixlInvalidParamError", "without a connection")
    here.notify("there", largest)
    there.signal(signal.SIGCONT)
    check([len(message) for _, message in there.notifications(1)] == [len(largest)], "the largest one did not arrive")
    check_equal(raised(here.notify, "there", largest + b"x"), "nixlInvalidParamError", "over a connection")
    there.close()


def flood(metadata, size, ready):
    node = Node(f"flood{os.getpid()}")
    name = node.connect(metadata)
    ready.set()
    message = b"x" * size
    while True:
        node.notify(name, message)


@case(timeout=120)
def notifications_return_under_a_flood():
    here = Node("here")
    here.allocate("data", 4096)
    context = multiprocessing.get_context("spawn")
    senders = []
    for _ in range(3):
        ready = context.Event()
        senders.append(context.Process(target=flood, args=(here.metadata(), 16, ready), daemon=True))
        senders[-1].start()
        check(ready.wait(30), "a sender did not start")
    longest, count, until = 0.0, 0, time.monotonic() + 5
    while time.monotonic() < until:
        begin = time.monotonic()
        count += sum(len(messages) for messages in here.agent.get_new_notifs().values())
        longest = max(longest, time.monotonic() - begin)
    for sender in senders:
        sender.kill()
    print(f"note: {count} notifications, longest call {longest:.3f} s")
    check(count > 0, "no notifications came")
    check(longest < AT_ONCE_S, f"a call took {longest:.1f} s")


def end_in_good_order(operation, size, turns):
    """NIXL's XferPostThenFail: the target deregisters its memory and ends with a transfer in flight."""
    states = {}
    for turn in range(turns):
        here, there = Node(f"here{turn}"), Node(f"there{turn}")
        here.allocate("data", size, 1)
        base, device = there.allocate("data", size, 2)
        here.connect(there.metadata())
        there.connect(here.metadata())
        remote, name = [(base, size, device)], f"there{turn}"
        check_equal(here.move(operation, "data", [(0, size)], remote, name), "DONE", "first transfer")
        handle = here.prepare(operation, here.local("data", [(0, size)]), remote, name)
        state = here.post(handle)
        there.deregister("data")
        there.forget(f"here{turn}")
        del there
        gc.collect()
        state = here.finish(handle) if state == "PROC" else state
        states[state] = states.get(state, 0) + 1
        handle.release()
        del here, handle
        gc.collect()
    print(f"note: {operation} of {size} bytes: {states}")
    check(set(states) <= {"DONE", LOST}, f"states: {states}")


@case(timeout=180)
def target_ends_in_good_order_during_a_small_write():
    end_in_good_order("WRITE", 256, 25)


@case(timeout=180)
def target_ends_in_good_order_during_a_small_read():
    end_in_good_order("READ", 256, 25)


@case(timeout=180)
def target_ends_in_good_order_during_a_large_write():
    end_in_good_order("WRITE", 64 * MIB, 5)


@case(timeout=180)
def target_ends_in_good_order_during_a_large_read():
    end_in_good_order("READ", 64 * MIB, 5)


@case()
def refused_memory_is_not_allowed():
    here, there, remote = pair(MIB)
    there.deregister("data")
    for operation in ("READ", "WRITE"):
        begin = time.monotonic()
        state = here.move(operation, "data", [(0, MIB)], remote, "there")
        took(begin, 5, f"a refused {operation}")
        check_equal(state, "nixlNotAllowedError", operation)
    there.close()


def keys(folder, mine, theirs):
    """Key files for the two agents; None: no key."""
    paths = []
    for name, key in (("mine", mine), ("theirs", theirs)):
        paths.append(os.path.join(folder, name) if key else None)
        if key:
            with open(os.open(paths[-1], os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
                file.write(key)
    return paths


@case()
def another_key_is_not_allowed():
    with tempfile.TemporaryDirectory() as folder:
        for mine, theirs in ((b"m" * 32, b"t" * 32), (b"m" * 32, None), (None, b"t" * 32)):
            one, two = keys(folder, mine, theirs)
            os.environ.pop("UCCL_TCPX_AUTH_KEY_FILE", None)
            if one:
                os.environ["UCCL_TCPX_AUTH_KEY_FILE"] = one
            here = Node("here")
            there = RemoteNode({"UCCL_TCPX_AUTH_KEY_FILE": two}, name="there")
            here.allocate("data", 4096)
            there.allocate("data", 4096)
            what = f"{'a' if mine else 'no'} key here, {'a' if theirs else 'no'} key there"
            check_equal(raised(here.connect, there.metadata()), "nixlNotAllowedError", what)
            there.close()
            del here
            gc.collect()
            for path in (one, two):
                if path:
                    os.remove(path)


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
