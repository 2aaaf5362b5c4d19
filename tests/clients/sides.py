"""The two processes of a test above NIXL, and the messages of its main program to them. Knows nothing of their work."""

import multiprocessing
import os
import signal
import sys
import time


class Side:
    """A process that runs target(pipe, *arguments), and this end of its pipe."""

    def __init__(self, name, target, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message):
        self.pipe.send(message)

    def answer(self, seconds=120):
        """The next message; the end of the program when there is none."""
        deadline = time.monotonic() + seconds
        while not self.pipe.poll(0.5):
            if not self.process.is_alive():
                sys.exit(f"FAILED: {self.name} has died")
            if time.monotonic() > deadline:
                sys.exit(f"FAILED: no answer from {self.name}")
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"FAILED: {self.name} has died")

    def stand_still(self, seconds):
        print(f"{self.name} stands still for {seconds:.0f} s", flush=True)
        os.kill(self.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self.process.pid, signal.SIGCONT)


def serve(pipe, work):
    """In a process: answers each message with the result of `work`. None ends the process without unloading its libraries."""
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        pipe.send(work(message))
    sys.stdout.flush()
    os._exit(0)


def conclude(sides, requests, failed, bytes_each, seconds):
    """Ends the processes, prints the result and ends the program with it."""
    for side in sides:
        side.send(None)
    print("\n".join(failed))
    good = requests - len(failed)
    print(f"{good} of {requests} requests, {bytes_each * good / 1e9:.2f} GB compared, {seconds:.1f} s")
    sys.exit(1 if failed else 0)
