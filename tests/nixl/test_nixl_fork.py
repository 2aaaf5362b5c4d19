"""Agents with the backend TCPX made after fork, as servers that fork their workers do. Run it with run.sh: NIXL_TEST=test_nixl_fork.py."""

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time
import traceback

import harness
from harness import Node, RemoteNode, case, check, check_equal

MIB = 1 << 20
CHILD_S = 40


def fork_child(work):
    """Runs `work` in a forked child that ends like a program. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child != 0:
        return child
    # This process must not end the parent's other processes.
    multiprocessing.process._children.clear()
    status = 1
    try:
        work()
        status = 0
    except SystemExit:
        # A child's child.
        raise
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ends the interpreter, which destroys inherited agents.
    raise SystemExit(status)


def end_of(child, seconds=CHILD_S):
    """A child's exit status; 1 for an exception, -9 when it did not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -9


def in_child(work):
    return end_of(fork_child(work))


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


@case(timeout=150)
def workers_as_vllm_starts_them():
    # A front end that has NIXL loaded forks an engine core, which holds the connector's scheduler role and no agent; that forks its tensor-parallel
    # workers, all at the same time, and each of these makes an agent.
    front = Node("front", params={})
    others = [other() for _ in range(3)]

    def engine_core():
        core = Node("core", params={})
        workers = [fork_child(lambda: fresh_agent(*others[rank], 10 * (rank + 1))) for rank in range(3)]
        check_equal([end_of(worker) for worker in workers], [0, 0, 0], "the workers")
        del core

    check_equal(end_of(fork_child(engine_core), 2 * CHILD_S), 0, "the engine core")
    for there, _ in others:
        there.kill()
    del front


def scheduler_of_sglang(metadata, remote, seed, answers):
    """Makes its agent in the main thread and uses it in another one, as SGLang's transfer workers do."""
    node = Node(f"rank{seed}")
    node.allocate("data", MIB, seed)
    node.connect(metadata)

    def transfer():
        try:
            write = node.move("WRITE", "data", [(0, MIB)], remote, "there", b"%d" % seed)
            node.fill("data", 0)
            read = node.move("READ", "data", [(0, MIB)], remote, "there")
            answers.put((seed, write, read, node.matches("data", seed)))
        except Exception as error:
            answers.put((seed, repr(error)))

    worker = threading.Thread(target=transfer)
    worker.start()
    worker.join()
    node = None


@case(timeout=150)
def schedulers_as_sglang_starts_them():
    # A launcher with its own agent spawns one scheduler per rank, all at the same time.
    launcher = Node("launcher")
    launcher.allocate("data", MIB)
    context = multiprocessing.get_context("spawn")
    others, answers = [other() for _ in range(3)], context.Queue()
    schedulers = []
    for rank, (there, remote) in enumerate(others):
        schedulers.append(context.Process(target=scheduler_of_sglang, args=(there.metadata(), remote, 10 * (rank + 1), answers), daemon=True))
        schedulers[-1].start()
    told = sorted(answers.get(timeout=100) for _ in schedulers)
    check_equal(told, [(10 * (rank + 1), "DONE", "DONE", True) for rank in range(3)], "the schedulers' results")
    for scheduler in schedulers:
        scheduler.join(30)
        check_equal(scheduler.exitcode, 0, "a scheduler")
    for there, _ in others:
        there.close()
    del launcher


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
