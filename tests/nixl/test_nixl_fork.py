"""Agents with the backend TCPX made after fork, as servers that fork their workers do. Run it with run.sh: NIXL_TEST=test_nixl_fork.py."""

import multiprocessing.process
import os
import signal
import sys
import time
import traceback

import harness
from harness import Node, RemoteNode, case, check, check_equal

MIB = 1 << 20
CHILD_S = 40


def in_child(work):
    """Runs `work` in a forked child that ends like a program does. Its exit status; 1 for an exception, -9 when it did not end in time."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        # The parent's other processes are not this one's to end.
        multiprocessing.process._children.clear()
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Through the interpreter's end, where inherited agents are destroyed.
        raise SystemExit(status)
    deadline = time.monotonic() + CHILD_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -9


def exchange(node, there, remote, seed):
    """A read, a write and a notification between an agent of this process and one elsewhere."""
    there.fill("data", seed)
    check_equal(node.move("READ", "data", [(0, MIB)], remote, "there"), "DONE", "read")
    check(node.matches("data", seed), "bytes read differ")
    node.fill("data", seed + 1)
    check_equal(node.move("WRITE", "data", [(0, MIB)], remote, "there", b"%d" % seed), "DONE", "write")
    check(there.matches("data", seed + 1), "bytes written differ")
    check_equal(there.notifications(1), [(node.name, b"%d" % seed)], "notification")


def other():
    there = RemoteNode(name="there")
    base, device = there.allocate("data", MIB, 2)
    return there, [(base, MIB, device)]


def fresh_agent(there, remote, seed):
    node = Node(f"child{seed}")
    node.allocate("data", MIB, 1)
    node.connect(there.metadata())
    exchange(node, there, remote, seed)


@case(timeout=90)
def parent_has_only_the_library():
    # The plugin is loaded and asked for its parameters, as vLLM's front end does; no agent has the backend yet.
    idle = Node("idle", params={})
    there, remote = other()
    check_equal(in_child(lambda: fresh_agent(there, remote, 10)), 0, "the child")
    there.kill()
    del idle


@case(timeout=90)
def parent_had_an_agent_that_ended():
    there, remote = other()
    fresh_agent(there, remote, 10)
    check_equal(in_child(lambda: fresh_agent(there, remote, 20)), 0, "the child")
    there.kill()


@case(timeout=120)
def parent_has_an_agent_at_work():
    there, remote = other()
    node = Node("parent")
    node.allocate("data", MIB, 1)
    node.connect(there.metadata())
    exchange(node, there, remote, 10)
    check_equal(in_child(lambda: fresh_agent(there, remote, 20)), 0, "the child")
    # The child's end, with the inherited agent in it, has not touched the parent's connection.
    exchange(node, there, remote, 30)
    there.close()


@case(timeout=120)
def inherited_agents_end_without_harm():
    there, remote = other()
    node = Node("parent")
    node.allocate("data", MIB, 1)
    node.connect(there.metadata())
    exchange(node, there, remote, 10)
    for turn in range(3):
        check_equal(in_child(lambda: None), 0, "a child that does nothing")
        exchange(node, there, remote, 20 + turn)
    there.close()


@case(timeout=120)
def inherited_agents_refuse_work():
    there, remote = other()
    node = Node("parent")
    node.allocate("data", MIB, 1)
    node.connect(there.metadata())
    exchange(node, there, remote, 10)
    handle = node.prepare("READ", node.local("data", [(0, MIB)]), remote, "there")

    def use():
        begin = time.monotonic()
        for what, call in (
            ("transfer", lambda: node.agent.transfer(handle)),
            ("send_notif", lambda: node.notify("there", b"from the child")),
            ("register_memory", lambda: node.allocate("more", 4096)),
        ):
            try:
                result = call()
            except Exception as error:
                print(f"note: {what}: {type(error).__name__}")
                continue
            check(result == "ERR", f"{what} with an inherited agent gave {result}")
        check(time.monotonic() - begin < 5, "the refusals took too long")

    check_equal(in_child(use), 0, "the child")
    exchange(node, there, remote, 20)
    check_equal(there.notifications(1, 0.3), [], "notifications from the child")
    there.close()


@case(timeout=120)
def several_workers_forked_one_after_the_other():
    there, remote = other()
    node = Node("parent")
    for turn in range(3):
        check_equal(in_child(lambda: fresh_agent(there, remote, 10 * turn)), 0, f"worker {turn}")
    there.kill()
    del node


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
