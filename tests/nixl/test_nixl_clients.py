"""Programs over NIXL agents as serving engines write them: prepared lists, requests by notification, many peers, threads, metadata by sockets."""

import asyncio
import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import numpy as np

import harness
from harness import Node, RemoteNode, at, case, check, check_equal, nixl_api, pair, pattern

MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


def nixl_bindings():
    import importlib

    return importlib.import_module(os.environ.get("NIXL_PACKAGE", "nixl") + "._bindings")


def raised(call, *args, **kwargs):
    """The name of the exception that a call raised, or its result in brackets."""
    try:
        return f"({call(*args, **kwargs)!r})"
    except Exception as error:
        return type(error).__name__


def until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, what)
        time.sleep(0.001)


def stamp(owner, generation, block, size):
    """The content of a block in one life."""
    base = np.uint64((owner << 48) ^ (generation << 24) ^ block)
    return (np.arange(size // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + base).view(np.uint8)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def usage():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident()


# ---- Decode reads what prefill holds, as vLLM's NixlConnector does ------------------------------------------------------------

LAYERS, BLOCKS, BLOCK = 4, 128, 16384


class Cache:
    """An agent with a paged cache of several layers, each registered separately."""

    def __init__(self, name, config=None):
        api = nixl_api()
        self.name = name
        self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=["TCPX"], **(config or {})))
        self.layers = [np.zeros((BLOCKS, BLOCK), dtype=np.uint8) for _ in range(LAYERS)]
        self.regions = self.agent.register_memory([(layer.ctypes.data, layer.nbytes, 0, "") for layer in self.layers], "DRAM")
        self.descriptors = [(layer.ctypes.data + i * BLOCK, BLOCK, 0) for layer in self.layers for i in range(BLOCKS)]

    def indices(self, blocks):
        return [layer * BLOCKS + block for layer in range(LAYERS) for block in blocks]

    def notes(self):
        for name, messages in self.agent.get_new_notifs().items():
            for message in messages:
                yield name, bytes(message)


def prefill(pipe, index, decodes):
    cache = Cache(f"prefill{index}")
    pipe.send((cache.agent.get_agent_metadata(), cache.descriptors))
    for metadata in pipe.recv():
        cache.agent.add_remote_agent(metadata)
    free, held, generation, ended, seen = list(range(BLOCKS)), {}, 0, 0, set()
    chance = random.Random(index)
    waiting = []
    while ended < decodes:
        for name, message in cache.notes():
            verb, request, *rest = message.split(b":")
            if (name, verb, request) in seen:
                pipe.send(f"doubled: {name} {message}")
            seen.add((name, verb, request))
            if verb == b"want":
                waiting.append((name, request, int(rest[0])))
            elif verb == b"done":
                blocks = held.pop((name, request))
                for layer in cache.layers:
                    layer[blocks] = 0xAA
                free.extend(blocks)
            elif verb == b"bye":
                ended += 1
        while waiting and len(free) >= waiting[0][2]:
            name, request, count = waiting.pop(0)
            chance.shuffle(free)
            blocks, free = free[:count], free[count:]
            generation += 1
            for number, layer in enumerate(cache.layers):
                for block in blocks:
                    layer[block] = stamp(index * 16 + number, generation, block, BLOCK)
            held[(name, request)] = blocks
            cache.agent.send_notif(name, b"have:%s:%d:%s" % (request, generation, b",".join(b"%d" % b for b in blocks)))
    pipe.send("held: %s" % held if held else "well")
    pipe.recv()


def decode(pipe, index, requests):
    cache = Cache(f"decode{index}")
    pipe.send((cache.agent.get_agent_metadata(), None))
    peers = pipe.recv()
    agent = cache.agent
    mine = agent.prep_xfer_dlist("NIXL_INIT_AGENT", cache.descriptors, "DRAM")
    theirs = {}
    for metadata, descriptors in peers:
        name = agent.add_remote_agent(metadata)
        name = name.decode() if isinstance(name, bytes) else name
        theirs[name] = agent.prep_xfer_dlist(name, descriptors, "DRAM")
    pipe.recv()
    chance, names = random.Random(100 + index), sorted(theirs)
    free, under_way, begun, ended, asked = list(range(BLOCKS)), [], 0, 0, {}
    wrong = []
    while ended < requests and not wrong:
        if begun < requests and len(asked) + len(under_way) < 6:
            name, request = chance.choice(names), b"%d.%d" % (index, begun)
            asked[request] = name
            agent.send_notif(name, b"want:%s:%d" % (request, chance.randint(1, 12)))
            begun += 1
        for name, message in cache.notes():
            verb, request, generation, blocks = message.split(b":")
            if asked.pop(request, None) != name:
                wrong.append(f"unexpected or duplicate: {name} {message}")
                continue
            blocks = [int(b) for b in blocks.split(b",")]
            chance.shuffle(free)
            local, free = free[: len(blocks)], free[len(blocks) :]
            handle = agent.make_prepped_xfer("READ", mine, cache.indices(local), theirs[name], cache.indices(blocks), b"done:" + request)
            under_way.append((handle, agent.transfer(handle), name, int(generation), local, blocks))
        still = []
        for handle, state, name, generation, local, blocks in under_way:
            state = agent.check_xfer_state(handle) if state == "PROC" else state
            if state == "PROC":
                still.append((handle, state, name, generation, local, blocks))
                continue
            if state != "DONE":
                wrong.append(f"{name}: {state}")
            owner = int(name[len("prefill") :])
            for number, layer in enumerate(cache.layers):
                for here, there in zip(local, blocks):
                    if not np.array_equal(layer[here], stamp(owner * 16 + number, generation, there, BLOCK)):
                        wrong.append(f"{name}: block {there} of generation {generation} differs")
            agent.release_xfer_handle(handle)
            free.extend(local)
            ended += 1
        under_way = still
    for name in names:
        agent.send_notif(name, b"bye:%d" % index)
    pipe.send("; ".join(wrong[:4]) or "well")
    pipe.recv()


def mesh(prefills, decodes, requests):
    processes, pipes = [], []
    for index in range(prefills + decodes):
        mine, theirs = SPAWN.Pipe()
        arguments = (theirs, index, decodes) if index < prefills else (theirs, index - prefills, requests)
        process = SPAWN.Process(target=prefill if index < prefills else decode, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        pipes.append(mine)

    def answer(pipe, seconds=100):
        check(pipe.poll(seconds), "a process did not answer")
        return pipe.recv()

    hello = [answer(pipe) for pipe in pipes]
    for pipe in pipes[:prefills]:
        pipe.send([metadata for metadata, _ in hello[prefills:]])
    for pipe in pipes[prefills:]:
        pipe.send(hello[:prefills])
    for pipe in pipes[prefills:]:
        pipe.send("go")
    verdicts = [answer(pipe) for pipe in pipes]
    check(all(v == "well" for v in verdicts), f"{verdicts}")
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join(30)
        check_equal(process.exitcode, 0, "exit code")


@case(timeout=150)
def decodes_read_from_prefills():
    mesh(4, 4, 120)


# ---- Prefill writes, decode counts notifications, as SGLang's disaggregation does --------------------------------------------

def writer(pipe, index, rooms):
    cache = Cache(f"writer{index}")
    pipe.send(cache.agent.get_agent_metadata())
    metadata, descriptors, first = pipe.recv()
    agent = cache.agent
    name = agent.add_remote_agent(metadata)
    name = name.decode() if isinstance(name, bytes) else name
    for room in range(rooms):
        block = first + room % (BLOCKS // 8)
        for number, layer in enumerate(cache.layers):
            layer[block] = stamp(index * 16 + number, room, block, BLOCK)
        handles = []
        # Each layer is a transfer with its notification; they are posted without polling earlier ones.
        for number in range(LAYERS):
            local = agent.get_xfer_descs([(cache.layers[number].ctypes.data + block * BLOCK, BLOCK, 0)], "DRAM")
            remote = agent.get_xfer_descs([descriptors[number * BLOCKS + block]], "DRAM")
            handles.append(agent.initialize_xfer("WRITE", local, remote, name, b"%d_%d_%d_%d" % (index, room, number, block)))
        for handle in handles:
            agent.transfer(handle)
        for handle in handles:
            state = "PROC"
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                pipe.send(state)
            agent.release_xfer_handle(handle)
        # The block may be written again once the reader has confirmed.
        until(lambda: any(message == b"seen" for _, message in cache.notes()), 30, "no answer")
    pipe.send("well")
    pipe.recv()


@case(timeout=150)
def notifications_of_writes_come_with_their_data():
    count, rooms = 4, 60
    cache = Cache("reader")
    processes, pipes = [], []
    for index in range(count):
        mine, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=writer, args=(theirs, index, rooms), daemon=True)
        process.start()
        processes.append(process)
        pipes.append(mine)
    for index, pipe in enumerate(pipes):
        check(pipe.poll(60), "no metadata")
        cache.agent.add_remote_agent(pipe.recv())
        pipe.send((cache.agent.get_agent_metadata(), cache.descriptors, index * (BLOCKS // 8)))
    seen, deadline = {}, time.monotonic() + 100
    while sum(len(v) for v in seen.values()) < count * rooms * LAYERS:
        check(time.monotonic() < deadline, f"notifications are lost: {[(k, len(v)) for k, v in seen.items()]}")
        for name, message in cache.notes():
            index, room, number, block = (int(part) for part in message.split(b"_"))
            check_equal(name, f"writer{index}", "name")
            check((room, number) not in seen.setdefault(index, set()), "a notification came twice")
            check(np.array_equal(cache.layers[number][block], stamp(index * 16 + number, room, block, BLOCK)), "the notification came before its data")
            seen[index].add((room, number))
            if len([1 for r, _ in seen[index] if r == room]) == LAYERS:
                cache.agent.send_notif(name, b"seen")
    for pipe in pipes:
        check(pipe.poll(30), "a writer did not end")
        check_equal(pipe.recv(), "well", "a writer")
        pipe.send("end")
    for process in processes:
        process.join(30)
        check_equal(process.exitcode, 0, "exit code")


# ---- Prefill and decode with different tensor parallelism, as vLLM's connectors slice blocks ---------------------------------

ROUNDS = 3


class Split:
    """A model's KV cache on the ranks of prefill and decode: each rank holds an equal share of the heads of every block."""

    def __init__(self, prefill, decode, head, layers=4, blocks=192, heads=8):
        self.prefill, self.decode, self.head, self.layers, self.blocks, self.heads = prefill, decode, head, layers, blocks, heads

    def requests(self, turn):
        """The block tables of a round, the same on all ranks: for each request its blocks at prefill and at decode."""
        chance = random.Random(turn)
        here, there = (chance.sample(range(self.blocks), self.blocks * 3 // 4) for _ in range(2))
        tables = []
        while here:
            count = chance.choice([1, 2, 7, 24])
            tables.append((here[:count], there[:count]))
            here, there = here[count:], there[count:]
        return tables

    def content(self, turn, request, layer, count, first, heads):
        """What the heads [first, first + heads) of the blocks of a request contain."""
        block, head = np.arange(count, dtype=np.uint64)[:, None, None], np.arange(first, first + heads, dtype=np.uint64)[None, :, None]
        base = np.uint64((turn << 48) ^ (request << 40) ^ (layer << 32)) ^ (block << np.uint64(16)) ^ head
        words = np.arange(self.head // 8, dtype=np.uint64)[None, None, :] * np.uint64(0x9E3779B97F4A7C15) + base
        return words.view(np.uint8).reshape(count, heads * self.head)


class SplitRank:
    """A rank: an agent, its share of the cache, each layer registered separately, and prepared lists for the ranks that it moves data with."""

    def __init__(self, name, split, rank, ranks):
        api = nixl_api()
        self.split, self.rank, self.ranks = split, rank, ranks
        self.heads = split.heads // ranks
        self.block = self.heads * split.head
        self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=["TCPX"]))
        self.layers = [np.zeros((split.blocks, self.block), dtype=np.uint8) for _ in range(split.layers)]
        self.regions = self.agent.register_memory([(layer.ctypes.data, layer.nbytes, 0, "") for layer in self.layers], "DRAM")
        self.bases = [layer.ctypes.data for layer in self.layers]
        self.lists, self.counts = {}, {}

    def content(self, turn, request, layer, count):
        return self.split.content(turn, request, layer, count, self.rank * self.heads, self.heads)

    def prepare(self, agent, bases, offset, length, stride):
        """A list of a slice of every block of every layer: one strided descriptor a layer where NIXL has them."""
        rows = [(base + offset, length, 0, stride, self.split.blocks) for base in bases]
        if "strided" in (self.agent.prep_xfer_dlist.__doc__ or ""):
            return self.agent.prep_xfer_dlist(agent, np.array(rows, dtype=np.uint64), "DRAM")
        blocks = [(base + i * stride, size, 0) for base, size, _, stride, count in rows for i in range(count)]
        return self.agent.prep_xfer_dlist(agent, blocks, "DRAM")

    def meet(self, peers, ranks, moves):
        """Loads the peer's ranks that share heads with this one. The rank that `moves` prepares a pair of lists for each."""
        split = self.split
        if ranks > self.ranks:
            targets = range(self.rank * ranks // self.ranks, (self.rank + 1) * ranks // self.ranks)
        else:
            targets = [self.rank * ranks // self.ranks]
        for position, target in enumerate(targets):
            metadata, bases = peers[target]
            name = self.agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else name
            theirs, slice_ = split.heads // ranks * split.head, self.block // len(targets)
            if moves:
                # The peer's whole block is a slice of this rank's, or the other way round.
                offset = self.rank % (self.ranks // ranks) * self.block if ranks < self.ranks else 0
                self.lists[name] = (self.prepare("NIXL_INIT_AGENT", self.bases, position * slice_, slice_, self.block),
                                    self.prepare(name, bases, offset, slice_, theirs))
            self.counts[name] = 0

    def post(self, operation, layers, mine, theirs, message):
        """One request for each peer rank, of these layers of some blocks."""
        started = []
        for name, (local, remote) in self.lists.items():
            ids = [np.concatenate([np.array(blocks, dtype=np.int32) + layer * self.split.blocks for layer in layers]) for blocks in (mine, theirs)]
            handle = self.agent.make_prepped_xfer(operation, local, ids[0], remote, ids[1], message)
            started.append((handle, self.agent.transfer(handle)))
        return started

    def finish(self, started):
        for handle, state in started:
            while state == "PROC":
                state = self.agent.check_xfer_state(handle)
            check_equal(state, "DONE", "transfer")
            self.agent.release_xfer_handle(handle)

    def notes(self):
        return [bytes(message) for messages in self.agent.get_new_notifs().values() for message in messages]

    def compare(self, turn, poison):
        """The whole cache of decode: every byte of every request, and no byte elsewhere."""
        for layer, data in enumerate(self.layers):
            expected = np.full_like(data, poison)
            for request, (_, theirs) in enumerate(self.split.requests(turn)):
                expected[theirs] = self.content(turn, request, layer, len(theirs))
            check(np.array_equal(data, expected), f"round {turn}: layer {layer} differs")

    # Each of the four below is a rank's part of a round.

    def push(self, turn):
        """Writes each layer once it is computed, while earlier ones are under way."""
        started = []
        for request, (mine, theirs) in enumerate(self.split.requests(turn)):
            for layer, data in enumerate(self.layers):
                data[mine] = self.content(turn, request, layer, len(mine))
                started += self.post("WRITE", [layer], mine, theirs, b"%d:%d" % (request, layer))
        self.finish(started)

    def take_pushes(self, turn):
        """Compares a layer of a request as soon as all the ranks that write it have said so."""
        tables, seen, writers = self.split.requests(turn), {}, len(self.counts)
        deadline = time.monotonic() + 60
        while sum(seen.values()) < len(tables) * self.split.layers * writers:
            check(time.monotonic() < deadline, f"notifications are lost: {sum(seen.values())}")
            for message in self.notes():
                request, layer = (int(part) for part in message.split(b":"))
                seen[message] = seen.get(message, 0) + 1
                if seen[message] == writers:
                    theirs = tables[request][1]
                    check(np.array_equal(self.layers[layer][theirs], self.content(turn, request, layer, len(theirs))), f"{message} came before its data")
        check(set(seen.values()) == {writers}, "a notification came twice")

    def pull(self, turn):
        """Reads all layers of a request at once."""
        started = []
        for request, (theirs, mine) in enumerate(self.split.requests(turn)):
            started += self.post("READ", range(self.split.layers), mine, theirs, b"%d" % request)
        self.finish(started)

    def give(self, turn):
        """Fills the blocks of the round, and overwrites those of a request once all its readers have said that they have them."""
        tables, readers, seen = self.split.requests(turn), len(self.counts), {}
        deadline = time.monotonic() + 60
        while sum(seen.values()) < len(tables) * readers:
            check(time.monotonic() < deadline, f"notifications are lost: {sum(seen.values())}")
            for message in self.notes():
                seen[message] = seen.get(message, 0) + 1
                if seen[message] == readers:
                    for layer in self.layers:
                        layer[tables[int(message)][0]] = 0xAA
        check(set(seen.values()) == {readers}, "a notification came twice")


def split_rank(pipe, role, split, rank, pushes):
    """A process: `role` prefill or decode."""
    ranks, others = (split.prefill, split.decode) if role == "prefill" else (split.decode, split.prefill)
    node = SplitRank(f"{role}{rank}", split, rank, ranks)
    pipe.send((node.agent.get_agent_metadata(), node.bases))
    node.meet(pipe.recv(), others, moves=pushes == (role == "prefill"))
    for turn in range(1, ROUNDS + 1):
        # Decode's blocks hold something else before; what prefill gives is there before decode reads.
        for number, layer in enumerate(node.layers):
            layer[:] = turn if role == "decode" else 0
            if role == "prefill" and not pushes:
                for request, (mine, _) in enumerate(split.requests(turn)):
                    layer[mine] = node.content(turn, request, number, len(mine))
        pipe.send("ready")
        pipe.recv()
        try:
            if role == "prefill":
                (node.push if pushes else node.give)(turn)
            else:
                (node.take_pushes if pushes else node.pull)(turn)
                node.compare(turn, turn)
        except harness.Failure as failure:
            pipe.send(f"{role}{rank}: {failure}")
            return
    pipe.send("well")
    pipe.recv()


def between(split, pushes):
    pipes, processes = [], []
    for role, ranks in (("prefill", split.prefill), ("decode", split.decode)):
        for rank in range(ranks):
            mine, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=split_rank, args=(theirs, role, split, rank, pushes), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)

    def answers(expected=None):
        given = []
        for pipe in pipes:
            check(pipe.poll(90), "a rank did not answer")
            given.append(pipe.recv())
            check(expected is None or given[-1] == expected, f"{given[-1]}")
        return given

    hello = answers()
    for number, pipe in enumerate(pipes):
        pipe.send(hello[split.prefill :] if number < split.prefill else hello[: split.prefill])
    for _ in range(ROUNDS):
        answers("ready")
        for pipe in pipes:
            pipe.send("go")
    answers("well")
    for pipe, process in zip(pipes, processes):
        pipe.send("end")
        process.join(30)
        check_equal(process.exitcode, 0, "exit code")


@case(timeout=120)
def layers_pushed_to_more_ranks_in_slices_of_512_bytes():
    between(Split(1, 4, 256), pushes=True)


@case(timeout=120)
def layers_pushed_to_fewer_ranks_in_slices_of_512_bytes():
    between(Split(4, 2, 256), pushes=True)


@case(timeout=120)
def blocks_read_from_fewer_ranks_in_slices_of_512_bytes():
    between(Split(2, 8, 512), pushes=False)


@case(timeout=120)
def blocks_read_from_more_ranks_in_slices_of_512_bytes():
    between(Split(4, 1, 256), pushes=False)


@case(timeout=120)
def layers_pushed_between_ranks_in_slices_of_16_kib():
    between(Split(2, 4, 8192), pushes=True)
    between(Split(4, 1, 8192), pushes=True)


# ---- Requests ----------------------------------------------------------------------------------------------------------------

@case()
def request_in_progress_is_not_posted_again():
    size = 128 * MIB
    here, there, remote = pair(size, 1)
    handle = here.prepare("WRITE", here.local("data", [(0, size)]), at(remote, [(0, size)]), "there", b"n")
    state = here.post(handle, b"n")
    again = raised(here.agent.transfer, handle, b"m") if state == "PROC" else "over"
    check(again in ("nixlRepostActiveError", "over", "('PROC')", "('DONE')"), f"second post: {again}")
    check_equal(here.finish(handle), "DONE", "write")
    check(there.matches("data", 1), "data differs")
    print("note: second post:", again, "notifications:", len(there.notifications(2, 0.5)))
    there.close()


@case()
def blocks_of_unequal_lengths():
    chance = random.Random(5)
    total = 32 * MIB
    here, there, remote = pair(total, 1, 2)
    for operation in ("WRITE", "READ") * 3:
        lengths, blocks, place = [], [], 0
        while place < total - 200_000 and len(blocks) < 3000:
            length = chance.choice([1, 2, 3, 7, 63, 64, 65, 511, 4095, 4096, 4097, chance.randint(1, 70_000), 65536, 131072])
            gap = chance.choice([0, 0, 1, 13])
            blocks.append((place, length))
            place += length + gap
        order = list(range(len(blocks)))
        chance.shuffle(order)
        # Blocks of one list land behind each other in another order.
        target, places = 0, {}
        for i in order:
            places[i] = target
            target += blocks[i][1] + 1
            if target > total:
                break
        chosen = [i for i in range(len(blocks)) if i in places and places[i] + blocks[i][1] <= total]
        here.fill("data", 1), there.fill("data", 2)
        state = here.move(operation, "data", [blocks[i] for i in chosen], at(remote, [(places[i], blocks[i][1]) for i in chosen]), "there")
        check_equal(state, "DONE", operation)
        mine, theirs = pattern(1, total), pattern(2, total)
        for i in chosen:
            (a, length), b = blocks[i], places[i]
            if operation == "WRITE":
                theirs[b : b + length] = mine[a : a + length]
        if operation == "READ":
            expected = mine.copy()
            for i in chosen:
                (a, length), b = blocks[i], places[i]
                expected[a : a + length] = theirs[b : b + length]
            check(here.get("data", 0, total) == expected.tobytes(), "read blocks differ")
        else:
            check(there.get("data", 0, total) == theirs.tobytes(), "written blocks differ")
    there.close()


# Neither a heartbeat nor a caller that polls all the time may be what drives it.
@case(timeout=120, UCCL_TCPX_PEER_TIMEOUT_MS=60000, UCCL_TCPX_TRANSFER_TIMEOUT_MS=60000)
def hundred_thousand_descriptors():
    count, block = 100_000, 256
    here, there, (base, device) = pair(count * block, 1, 2)
    agent = here.agent
    order = np.random.default_rng(1).permutation(count).astype(np.int32)
    mine = agent.prep_xfer_dlist("NIXL_INIT_AGENT", here.local("data", [(i * block, block) for i in range(count)]), "DRAM")
    theirs = agent.prep_xfer_dlist("there", [(base + i * block, block, device) for i in range(count)], "DRAM")
    expected = pattern(1, count * block).reshape(count, block)
    for operation in ("READ", "WRITE", "READ", "WRITE", "WRITE", "READ"):
        handle = agent.make_prepped_xfer(operation, mine, np.arange(count, dtype=np.int32), theirs, order, b"all")
        begin = time.monotonic()
        state = here.post(handle)
        while state == "PROC":
            time.sleep(0.001)
            state = agent.check_xfer_state(handle)
        check_equal(state, "DONE", operation)
        seconds = time.monotonic() - begin
        print(f"note: {operation} {seconds:.3f} s")
        check(seconds < 5, f"{operation} took {seconds:.1f} s")
        source = pattern(2, count * block).reshape(count, block)
        if operation == "READ":
            expected = source[order]
        check(here.get("data", 0, count * block) == expected.tobytes(), "blocks differ")
        check_equal(there.notifications(1), [("here", b"all")], "notification")
        agent.release_xfer_handle(handle)
    check(there.matches("data", 2), "the data read and written back differs")
    there.close()


@case()
def nothing_to_move():
    here, there, remote = pair(4096, 1, 2)
    empty = raised(here.run, "WRITE", [], [], "there")
    zero = raised(here.move, "WRITE", "data", [(0, 0)], at(remote, [(0, 0)]), "there", b"zero")
    mixed = raised(here.move, "WRITE", "data", [(0, 0), (5, 10), (20, 0), (30, 5)], at(remote, [(1, 0), (7, 10), (3, 0), (40, 5)]), "there", b"mixed")
    print(f"note: no descriptors: {empty}, an empty one: {zero}, among others: {mixed}; notifications {there.notifications(2, 0.5)}")
    if mixed == "('DONE')":
        check(there.matches("data", 1, 7, 5, 10) and there.matches("data", 1, 40, 30, 5) and there.matches("data", 2, 0, 0, 7), "data")
    registered = raised(here.agent.register_memory, [(here.buffers["data"].address, 0, 0, "")], "DRAM")
    print("note: empty region:", registered)
    check_equal(here.move("WRITE", "data", [(0, 4096)], at(remote, [(0, 4096)]), "there"), "DONE", "afterwards")
    there.close()


@case()
def overlapping_registrations():
    here, there, remote = pair(MIB, 1, 2)
    agent, base = here.agent, here.buffers["data"].address
    inner = [agent.register_memory([(base + offset, size, 0, "")], "DRAM") for offset, size in [(0, 4096), (100, 500_000), (300_000, 700_000), (0, MIB)]]
    there.forget("here")
    there.connect(here.metadata())
    check_equal(there.move("READ", "data", [(0, MIB)], [(base, MIB, 0)], "here"), "DONE", "read by the peer")
    for region in inner:
        check_equal(here.move("WRITE", "data", [(50, 900_000)], at(remote, [(7, 900_000)]), "there"), "DONE", "write")
        check(there.matches("data", 1, 7, 50, 900_000), "data differs")
        agent.deregister_memory(region)
    check_equal(here.move("READ", "data", [(50, 900_000)], at(remote, [(7, 900_000)]), "there"), "DONE", "after they have ended")
    there.close()


@case()
def what_an_agent_tells_of_a_request():
    here, there, remote = pair(4 * MIB, 1, 2, config={"capture_telemetry": True})
    agent = here.agent
    handle = here.prepare("WRITE", here.local("data", [(0, 4 * MIB)]), at(remote, [(0, 4 * MIB)]), "there")
    check_equal(agent.query_xfer_backend(handle), "TCPX", "backend")
    first = raised(agent.estimate_xfer_cost, handle)
    for _ in range(5):
        state = here.post(handle)
        state = here.finish(handle) if state == "PROC" else state
        check_equal(state, "DONE", "write")
    telemetry = agent.get_xfer_telemetry(handle)
    check_equal((telemetry.totalBytes, telemetry.descCount), (4 * MIB, 1), "telemetry")
    print(f"note: first estimate {first}, then {agent.estimate_xfer_cost(handle)}; telemetry {telemetry.postDuration} {telemetry.xferDuration}")
    query = raised(agent.query_memory, agent.get_reg_descs([(here.buffers["data"].address, 4096, 0, "")], "DRAM"), "TCPX")
    print("note: query_memory:", query)
    there.close()


# ---- Memory ------------------------------------------------------------------------------------------------------------------

def deregister_under(operation):
    """The owner ends a region while a peer moves it, and writes or reads the memory as its own at once."""
    size = 64 * MIB
    outcomes = {}
    here = Node("here")
    there = RemoteNode(name="there")
    there.allocate("data", size, 1)
    there.connect(here.metadata())
    for turn in range(10):
        base, _ = here.allocate(f"b{turn}", size, 50 + turn)
        there.forget("here")
        there.connect(here.metadata())
        there.fill("data", 1)
        there.start("move_until", operation, "data", [(0, size)], [(base, size, 0)], "here", 3)
        time.sleep(0.02 + 0.013 * turn)
        here.deregister(f"b{turn}")
        array = here.buffers[f"b{turn}"].array
        array[:] = 0xEE
        state, _ = there.result()
        outcomes[state] = outcomes.get(state, 0) + 1
        check(state in ("nixlNotAllowedError", "nixlCancelledError", "nixlRemoteDisconnectError", "nixlNotFoundError"), f"turn {turn}: {state}")
        time.sleep(0.05)
        check(bool((array == 0xEE).all()), "memory was written after its registration had ended")
        del here.buffers[f"b{turn}"]
    print("note:", outcomes)
    there.close()


@case(timeout=120)
def region_ends_while_a_peer_reads():
    deregister_under("READ")


@case(timeout=120)
def region_ends_while_a_peer_writes():
    deregister_under("WRITE")


def blocks_are_read_again():
    """A request is abandoned and its blocks go to the next one while bytes for the first still arrive, as after an abort."""
    size = 32 * MIB
    here, there, remote = pair(size, 1, 2)
    for turn in range(10):
        handle = here.prepare("READ", here.local("data", [(0, size)]), at(remote, [(0, size)]), "there")
        here.post(handle)
        handle.release()
        check_equal(here.move("READ", "data", [(0, size)], at(remote, [(0, size)]), "there"), "DONE", f"turn {turn}")
        check(here.matches("data", 2), "data differs")
    there.close()


@case()
def blocks_of_a_released_read_are_read_again():
    blocks_are_read_again()


@case(UCCL_P2P_DISABLE_IPC=1, UCCL_TCPX_PROTECT="encrypt")
def blocks_of_a_released_read_are_read_again_encrypted():
    blocks_are_read_again()


# ---- Agents that come and go -------------------------------------------------------------------------------------------------

def settled(measure):
    """Waits for closes in the background."""
    last, deadline = measure(), time.monotonic() + 15
    while time.monotonic() < deadline:
        time.sleep(1.5)
        now = measure()
        if now[:2] == last[:2]:
            return now
        last = now
    return last


def grown(before, after, what, bytes_allowed):
    # Fewer than one a cycle: connections of the last cycles may still be closing.
    check(after[0] <= before[0] + 40, f"{what}: descriptors {before[0]} -> {after[0]}")
    check(after[1] <= before[1] + 4, f"{what}: threads {before[1]} -> {after[1]}")
    check(after[2] <= before[2] + bytes_allowed, f"{what}: memory {before[2] >> 10} -> {after[2] >> 10} KiB")


def leave_nothing(there, cycle, cycles, bytes_allowed):
    """Runs cycles, after some warm-up; neither this process nor that of `there` holds more resources afterwards. Ends `there`."""
    def held():
        return settled(usage), settled(lambda: (there.descriptors(), there.threads(), 0))

    for turn in range(cycles // 3):
        cycle(turn)
    before, theirs_before = held()
    for turn in range(cycles):
        cycle(turn)
    after, theirs_after = held()
    print("note:", before, after, theirs_before, theirs_after)
    grown(before, after, "here", bytes_allowed)
    grown(theirs_before, theirs_after, "there", bytes_allowed)
    there.close()


@case(timeout=200)
def cycles_of_everything_leave_nothing():
    size, block = MIB, 4096
    here, there, remote = pair(size, 1, 2)
    agent = here.agent

    def cycle(turn):
        extra = here.allocate("extra", size, turn)
        check_equal(here.connect(there.metadata()), "there", "name")
        mine = agent.prep_xfer_dlist("NIXL_INIT_AGENT", here.local("extra", [(i * block, block) for i in range(256)]), "DRAM")
        theirs = agent.prep_xfer_dlist("there", at(remote, [(i * block, block) for i in range(256)]), "DRAM")
        chosen = [int(i) for i in np.random.default_rng(turn).permutation(256)[:32]]
        handle = agent.make_prepped_xfer("WRITE", mine, chosen, theirs, chosen, b"cycle")
        state = here.post(handle)
        state = here.finish(handle) if state == "PROC" else state
        check_equal(state, "DONE", f"turn {turn}")
        handle2 = agent.make_prepped_xfer("READ", mine, chosen, theirs, chosen, b"")
        here.post(handle2)
        agent.release_xfer_handle(handle)
        agent.release_xfer_handle(handle2)
        agent.release_dlist_handle(mine)
        agent.release_dlist_handle(theirs)
        agent.send_notif("there", b"plain")
        check_equal(there.notifications(2), [("here", b"cycle"), ("here", b"plain")], f"notifications of turn {turn}")
        here.forget("there")
        here.deregister("extra")
        del here.buffers["extra"], extra

    leave_nothing(there, cycle, int(os.environ.get("CLIENT_CYCLES", "300")), 8 * MIB)


@case(timeout=200)
def cycles_of_agents_leave_nothing():
    there = RemoteNode(name="there")
    remote = there.allocate("data", MIB, 2)

    def cycle(turn):
        node = Node(f"agent{turn % 3}")
        node.allocate("data", MIB, turn)
        node.connect(there.metadata())
        check_equal(node.move("WRITE", "data", [(0, MIB)], at(remote, [(0, MIB)]), "there", b"x"), "DONE", "write")
        check_equal(there.notifications(1), [(f"agent{turn % 3}", b"x")], "notification")

    leave_nothing(there, cycle, int(os.environ.get("CLIENT_AGENTS", "60")), 24 * MIB)


@case()
def removed_and_added_with_more_memory():
    here, there, remote = pair(MIB, 1, 2)
    for turn in range(30):
        more = there.allocate(f"more{turn}", MIB, 10 + turn)
        late = raised(here.move, "READ", "data", [(0, MIB)], at(more, [(0, MIB)]), "there")
        check(late != "('DONE')" or turn == 0, f"memory that was not loaded: {late}")
        if turn % 2:
            here.forget("there")
        here.connect(there.metadata())
        check_equal(here.move("READ", "data", [(0, MIB)], at(more, [(0, MIB)]), "there"), "DONE", "read")
        check(here.matches("data", 10 + turn), "data differs")
        if turn >= 3:
            there.deregister(f"more{turn - 3}")
    there.close()


@case()
def request_of_a_removed_agent():
    here, there, remote = pair(4 * MIB, 1, 2)
    handle = here.prepare("WRITE", here.local("data", [(0, 4 * MIB)]), at(remote, [(0, 4 * MIB)]), "there")
    first = here.post(handle)
    here.forget("there")
    gone = here.finish(handle) if first == "PROC" else first
    here.connect(there.metadata())
    again = here.post(handle)
    again = here.finish(handle) if again == "PROC" else again
    print("note:", gone, again)
    check(again in ("DONE", "nixlNotFoundError", "nixlRepostActiveError"), again)
    handle.release()
    check_equal(here.move("WRITE", "data", [(0, 4 * MIB)], at(remote, [(0, 4 * MIB)]), "there"), "DONE", "a new one")
    check(there.matches("data", 1), "data differs")
    there.close()


@case()
def partial_metadata():
    here = Node("here")
    there = RemoteNode(name="there")
    here.allocate("data", MIB, 1)
    api_there_base, _ = there.allocate("a", MIB, 2)
    two = Node("two")
    a, b = two.allocate("a", MIB, 3), two.allocate("b", MIB, 4)
    agent = two.agent
    only_a = agent.get_partial_agent_metadata(two.registrations["a"], True, ["TCPX"])
    connection = agent.get_partial_agent_metadata(agent.agent and nixl_bindings().nixlRegDList(agent.nixl_mems["DRAM"]), True, ["TCPX"])
    check_equal(here.connect(connection), "two", "name")
    here.notify("two", b"no memory yet")
    check_equal(two.notifications(1), [("here", b"no memory yet")], "notification")
    check(raised(here.move, "READ", "data", [(0, MIB)], at(a, [(0, MIB)]), "two") == "nixlNotFoundError", "unknown memory")
    check_equal(here.connect(only_a), "two", "name")
    check_equal(here.move("READ", "data", [(0, MIB)], at(a, [(0, MIB)]), "two"), "DONE", "read a")
    check(here.matches("data", 3), "data differs")
    check(raised(here.move, "READ", "data", [(0, MIB)], at(b, [(0, MIB)]), "two") == "nixlNotFoundError", "unknown memory")
    only_b = agent.get_partial_agent_metadata(two.registrations["b"], False, ["TCPX"])
    check_equal(here.connect(only_b), "two", "name")
    check_equal(here.move("READ", "data", [(0, MIB)], at(b, [(0, MIB)]), "two"), "DONE", "read b")
    check(here.matches("data", 4), "data differs")
    there.close()


def free_port():
    from test_nixl_tcpx import free_port as port
    return port()


@case()
def metadata_by_sockets_among_three():
    ports = [free_port() for _ in range(3)]
    nodes = [Node(f"n{i}", config={"enable_listen_thread": True, "listen_port": ports[i]}) for i in range(3)]
    places = [node.allocate("data", MIB, i) for i, node in enumerate(nodes)]
    for i, node in enumerate(nodes):
        for j in range(3):
            if i != j:
                node.agent.send_local_metadata("127.0.0.1", ports[j])
    for i, node in enumerate(nodes):
        for j in range(3):
            if i != j:
                until(lambda: node.agent.check_remote_metadata(f"n{j}"), 10, "metadata did not come")
    for i, node in enumerate(nodes):
        for j in range(3):
            if i != j:
                check_equal(node.move("READ", "data", [(0, MIB)], at(places[j], [(0, MIB)]), f"n{j}", b"read"), "DONE", "read")
                check(node.matches("data", j), "data differs")
                node.fill("data", i)
    nodes[0].agent.invalidate_local_metadata("127.0.0.1", ports[1])
    until(lambda: not nodes[1].agent.check_remote_metadata("n0"), 10, "metadata was not taken back")
    check(raised(nodes[1].move, "READ", "data", [(0, MIB)], at(places[0], [(0, MIB)]), "n0") != "('DONE')", "a removed agent")
    nodes[1].agent.fetch_remote_metadata("n0", "127.0.0.1", ports[0])
    until(lambda: nodes[1].agent.check_remote_metadata("n0"), 10, "metadata did not come again")
    check_equal(nodes[1].move("READ", "data", [(0, MIB)], at(places[0], [(0, MIB)]), "n0"), "DONE", "read again")


def restarted(how):
    here = Node("here")
    here.allocate("data", 4 * MIB, 1)
    for life in range(8):
        there = RemoteNode(name="there")
        remote = there.allocate("data", 4 * MIB, 10 + life)
        metadata = there.metadata()
        if life:
            raised(here.forget, "there")
        check_equal(here.connect(metadata), "there", "name")
        there.connect(here.metadata())
        check_equal(here.move("READ", "data", [(0, 4 * MIB)], at(remote, [(0, 4 * MIB)]), "there", b"life"), "DONE", f"read, life {life}")
        check(here.matches("data", 10 + life), f"data of life {life} differs")
        check_equal(there.notifications(1), [("here", b"life")], "notification")
        there.start("move_until", "WRITE", "data", [(0, 4 * MIB)], [(here.buffers["data"].address, 4 * MIB, 0)], "here", 5)
        time.sleep(0.05)
        there.signal(signal.SIGKILL)
        there.process.join()
        begin = time.monotonic()
        state = here.try_move("READ", "data", [(0, 4 * MIB)], at(remote, [(0, 4 * MIB)]), "there")
        check(state != "DONE", "a read from a killed peer")
        check(time.monotonic() - begin < 10, f"{state} took {time.monotonic() - begin:.1f} s")


@case(timeout=120, UCCL_TCPX_PEER_TIMEOUT_MS=4000, UCCL_TCPX_TRANSFER_TIMEOUT_MS=4000)
def peers_killed_and_started_again_under_their_name():
    restarted("killed")


@case(timeout=150, UCCL_TCPX_PEER_TIMEOUT_MS=3000, UCCL_TCPX_TRANSFER_TIMEOUT_MS=3000)
def a_stopped_peer_keeps_no_other():
    """One peer of three is stopped in the middle of transfers; the others continue, and so does it once it is resumed."""
    size = 32 * MIB
    here = Node("here")
    for i in range(3):
        here.allocate(f"data{i}", size, 1)
    peers = [RemoteNode(name=f"p{i}") for i in range(3)]
    remotes = [peer.allocate("data", size, 10 + i) for i, peer in enumerate(peers)]
    for peer in peers:
        here.connect(peer.metadata())
    for turn in range(3):
        handles = [here.prepare("READ", here.local(f"data{i}", [(0, size)]), at(remotes[i], [(0, size)]), f"p{i}", b"r") for i in range(3)]
        peers[0].signal(signal.SIGSTOP)
        states = [here.post(handle) for handle in handles]
        begin = time.monotonic()
        for i in (1, 2):
            state = here.finish(handles[i]) if states[i] == "PROC" else states[i]
            check_equal(state, "DONE", f"peer {i}")
        check(time.monotonic() - begin < 3, "others had to wait")
        state = here.finish(handles[0], 20) if states[0] == "PROC" else states[0]
        print("note: stopped peer:", state, f"{time.monotonic() - begin:.1f} s")
        check(state in ("DONE", "nixlRemoteDisconnectError"), state)
        peers[0].signal(signal.SIGCONT)
        deadline = time.monotonic() + 20
        state = ""
        while state != "DONE":
            check(time.monotonic() < deadline, f"the resumed peer is not reached: {state}")
            raised(here.connect, peers[0].metadata())
            state = here.try_move("READ", "data0", [(0, size)], at(remotes[0], [(0, size)]), "p0")
        check(all(here.matches(f"data{i}", 10 + i) for i in range(3)), "data differs")
        for handle in handles:
            raised(handle.release)
    for peer in peers:
        peer.close()


# ---- Threads and loops -------------------------------------------------------------------------------------------------------

def threads_ask(mode, progress):
    api = nixl_api()
    sync = {} if mode is None else {"sync_mode": getattr(api.nixl_thread_sync_t, f"NIXL_THREAD_SYNC_{mode}")}
    config = {"enable_prog_thread": progress, **sync}
    here, there, remote = pair(8 * MIB, 1, 2, config=config)
    agent = here.agent
    turns = 300
    for turn in range(turns):
        size = [4096, 65536, 8 * MIB][turn % 3] if turn % 30 == 2 else 4096
        handle = here.prepare("WRITE", here.local("data", [(0, size)]), at(remote, [(0, size)]), "there", b"%d" % turn)
        here.post(handle, b"%d" % turn)
        wrong = []

        def ask():
            state = "PROC"
            while state == "PROC":
                try:
                    state = agent.check_xfer_state(handle)
                except Exception as error:
                    state = type(error).__name__
            if state != "DONE":
                wrong.append(state)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(not wrong, f"{wrong}")
        handle.release()
    notes = there.notifications(turns, 5)
    there_more = there.notifications(1, 0.3)
    got = [int(message) for _, message in notes + there_more]
    doubled = sorted(set(n for n in got if got.count(n) > 1))
    print(f"note: {len(got)} notifications, twice: {len(doubled)}")
    check(sorted(got) == list(range(turns)), f"notifications: {len(got)}, twice: {doubled}")
    there.close()


@case()
def threads_ask_for_one_request_strict():
    threads_ask("STRICT", True)


@case()
def threads_ask_for_one_request_readers():
    threads_ask("RW", True)


@case()
def threads_ask_for_one_request_default():
    threads_ask(None, False)


@case(timeout=120)
def threads_with_requests_of_their_own():
    """Threads post, poll and release their own requests and send notifications on one agent, while one takes notifications."""
    api = nixl_api()
    count, size, turns = 6, 256 * 1024, 80
    here, there, remote = pair(count * size, 1, 2, config={"sync_mode": api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW})
    wrong = []

    def work(number):
        try:
            for turn in range(turns):
                block = [(number * size, size)]
                state = here.move("WRITE" if turn % 2 else "READ", "data", block, at(remote, block), "there", b"%d.%d" % (number, turn))
                if state != "DONE":
                    wrong.append(state)
                here.agent.send_notif("there", b"n%d.%d" % (number, turn))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not wrong, f"{wrong[:3]}")
    got = [m for _, m in there.notifications(2 * count * turns, 20)] + [m for _, m in there.notifications(1, 0.3)]
    expected = sorted([b"%d.%d" % (i, t) for i in range(count) for t in range(turns)] + [b"n%d.%d" % (i, t) for i in range(count) for t in range(turns)])
    check_equal(len(got), len(expected), "notifications")
    check(sorted(got) == expected, "notifications differ")
    for i in range(count):
        own = [m for m in got if m.startswith(b"%d." % i) or m.startswith(b"n%d." % i)]
        check(own == [m for t in range(turns) for m in (b"%d.%d" % (i, t), b"n%d.%d" % (i, t))], "order of one thread's notifications")
    there.close()


@case()
def coroutines_wait_for_requests():
    count, size = 64, 128 * 1024
    here, there, remote = pair(count * size, 1, 2)

    async def one(number):
        block = [(number * size, size)]
        handle = here.prepare("READ", here.local("data", block), at(remote, block), "there", b"%d" % number)
        state = here.agent.transfer(handle, b"%d" % number)
        while state == "PROC":
            await asyncio.sleep(0)
            state = here.agent.check_xfer_state(handle)
        here.agent.release_xfer_handle(handle)
        return state

    async def everything():
        return await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(count))), 30)

    check_equal(set(asyncio.run(everything())), {"DONE"}, "states")
    check(here.matches("data", 2), "data differs")
    got = there.notifications(count)
    check_equal(sorted(int(m) for _, m in got), list(range(count)), "notifications")
    there.close()


@case(timeout=120)
def eight_agents_of_one_process():
    count, size = 8, MIB
    nodes = [Node(f"a{i}", config={"enable_prog_thread": bool(i % 2)}) for i in range(count)]
    places = [node.allocate("data", count * size, i) for i, node in enumerate(nodes)]
    for node in nodes:
        for other in nodes:
            if other is not node:
                node.connect(other.metadata())
    wrong = []

    def work(i):
        try:
            for j in range(count):
                state = nodes[i].move("WRITE", "data", [(j * size, size)], at(places[j], [(i * size, size)]), f"a{j}", b"%d" % i) if i < j else "DONE"
                if state != "DONE":
                    wrong.append((i, j, state))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not wrong, f"{wrong[:3]}")
    for j in range(count):
        got = sorted(nodes[j].notifications(j))
        check_equal(got, sorted((f"a{i}", b"%d" % i) for i in range(j)), "notifications")


@case()
def notifications_of_every_kind():
    here, there, _ = pair(4096)
    api = nixl_api()
    long_name = "n" * 3000
    strange = Node(long_name)
    strange.connect(there.metadata())
    strange.notify("there", b"\0\xff\n")
    check_equal(there.notifications(1), [(long_name, b"\0\xff\n")], "from a long name")
    empty = raised(here.notify, "there", b"")
    print("note: empty:", empty, there.notifications(1, 0.3))
    check(raised(here.notify, "unknown", b"x") == "nixlNotFoundError", "an unknown agent")
    for n in range(5000):
        here.notify("there", b"%d" % n)
    got = there.notifications(5000)
    check([m for _, m in got] == [b"%d" % n for n in range(5000)], "order or number")
    there.close()


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
