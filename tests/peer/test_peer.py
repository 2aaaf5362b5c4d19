#!/usr/bin/env python3
"""The peer of peer.py with the library, as connector and as listener. Every byte that arrives is compared.
usage: test_peer.py LIBRARY [WORD...]     only the cases whose names contain one of the words
"""

import os
import random
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import deque

# Before the library reads them.
os.environ.update(UCCL_P2P_DISABLE_IPC="1", UCCL_TCPX_PLUGIN="soft", UCCL_TCPX_NUM_CHANNELS="2")
os.environ.update(NCCL_SOCKET_IFNAME="lo", NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="lo")

import session
from library import Engine, Library
from host import address_of
from peer import F_ARRIVED, F_CHUNKS, F_DONE, F_LOST, F_READ, F_READ_DATA, F_WRITE, F_WRITE_DATA, READ, Item, Peer
from session import ENCRYPT, ERR_AUTH, ERR_CANCELED, ERR_PROTOCOL, ERR_REMOTE_ACCESS, ERR_REMOTE_DISCONNECT, ERR_TIMED_OUT, ERR_TRUNCATED
from session import ERR_NOT_FOUND, ERR_UNSUPPORTED, INTEGRITY, OFF, OK, SECONDS, Failed

KEY, OTHER_KEY = b"a key of 32 bytes for this test!", b"another key, which has 32 bytes."
LEVELS = {OFF: "off", INTEGRITY: "integrity", ENCRYPT: "encrypt"}
LARGE = 300_001  # several chunks, the last of them short
RANDOM = random.Random(1)
TIMED_OUT_HERE = 1  # UCCL_IN_PROGRESS of a wait of 0 ms


def shown(value):
    if isinstance(value, (bytes, bytearray)) and len(value) > 80:
        return f"{len(value)} bytes"
    return tuple(map(shown, value)) if isinstance(value, tuple) else value


def equal(found, wanted, what):
    if found != wanted:
        raise AssertionError(f"{what}: {shown(found)} instead of {shown(wanted)}")


def fails(call, status):
    """The call must raise Failed with this status."""
    try:
        call()
    except Failed as failed:
        equal(failed.status, status, f"the status of '{failed.text}'")
        return
    raise AssertionError("it did not fail")


def refused(connected):
    """The library's connect must fail too."""
    try:
        connected()
    except RuntimeError:
        return
    raise AssertionError("the library has connected, and the peer has not accepted")


def eventually(condition, what):
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not in {SECONDS} s")
        time.sleep(0.005)


class Pair:
    """A connection between a Peer, `mine`, and an engine of the library, `conn`."""

    def __init__(self, library, connector, peer, **settings):
        self.peer, self.engine, self.mine = peer, Engine(library, **settings), None
        try:
            if connector:
                self.mine = peer.connect(self.engine.address())
                self.conn = self.engine.accept()
            else:
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    connected = self.engine.connecting(listener.getsockname()[1])
                    try:
                        self.mine = peer.accept(listener)
                    except Failed:
                        refused(connected)
                        raise
                    self.conn = connected()
        except Exception:
            self.__exit__()
            raise

    @classmethod
    def session_of(cls, library, peer, settings):
        """The session of another connection, with another engine."""
        with cls(library, True, peer, **settings) as other:
            return other.mine.session

    def wait(self, number):
        """Handles frames until a transfer of the library has ended; its status."""
        self.mine.until(lambda: self.conn.wait(number, 0)[0] != TIMED_OUT_HERE)
        return self.conn.wait(number)[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.engine.destroy()
        if self.mine:
            self.mine.end()


# ---- What a connection does ----


def one_sided_by_peer(pair):
    mine, before, data = pair.mine, RANDOM.randbytes(LARGE), RANDOM.randbytes(LARGE)
    memory = pair.engine.memory(before)
    item = Item(memory.item())
    equal((item.size, item.memory, item.version), (LARGE, Item.HOST_MEMORY, Item.VERSION), "fields of a FIFO item")
    equal(item.instance, mine.session.peer_instance, "the instance in a FIFO item")
    equal(mine.result(mine.read([(item, 0, LARGE)])), (OK, before), "a read")
    equal(mine.result(mine.write([(item, 0, LARGE)], data)), (OK, ""), "a write")
    equal(memory.bytes(), data, "the bytes of a write")
    # Segments in another order than their addresses.
    segments = [(item, 70_000, LARGE - 70_000), (item, 1, 69_999), (item, 0, 1)]
    equal(mine.result(mine.read(segments)), (OK, data[70_000:] + data[1:70_000] + data[:1]), "a read of segments")
    equal(mine.result(mine.write(segments, before[70_000:] + before[1:70_000] + before[:1])), (OK, ""), "a write of segments")
    equal(memory.bytes(), before, "the bytes of a write of segments")
    for size in (1, 8192, 8193, 65_536):
        equal(mine.result(mine.write_with_data([(item, 7, size)], data[:size])), (OK, ""), "a write with its data")
        equal(mine.result(mine.read([(item, 7, size)])), (OK, data[:size]), "a small read")
        equal(memory.bytes(), before[:7] + data[:size] + before[7 + size :], "the bytes of a write with its data")


def one_sided_by_library(pair):
    data = RANDOM.randbytes(LARGE)
    region, source, target = pair.peer.register(bytearray(LARGE)), pair.engine.memory(data), pair.engine.memory(bytes(LARGE))
    for segments in ([(0, LARGE, 0)], [(200_000, 100_000, 0), (0, 1, 299_000)], [(0, 1, 9)], [(0, 8192, 9)], [(0, 8193, 9)], [(0, 65_536, 9)]):
        there = [(here, length, region.item(offset)) for here, length, offset in segments]
        after = bytearray(region.memory)
        for here, length, offset in segments:
            after[offset : offset + length] = data[here : here + length]
        equal(pair.wait(pair.conn.one_sided("write_vector", source, there)), OK, "a write of the library")
        equal(region.memory, after, "the bytes of a write of the library")
        equal(pair.wait(pair.conn.one_sided("read_vector", target, there)), OK, "a read of the library")
        for here, length, _ in segments:
            equal(target.bytes()[here : here + length], data[here : here + length], "the bytes of a read of the library")


def messages(pair):
    mine = pair.mine
    for size in (LARGE, 0, 1, 8192):
        data = RANDOM.randbytes(size)
        memory, source = pair.engine.memory(bytes(LARGE)), pair.engine.memory(data or b"-")
        receive = pair.conn.recv(memory, LARGE)
        equal(mine.result(mine.send_message(data)), (OK, ""), "a message to the library")
        equal(pair.conn.wait(receive), (OK, size), "the library's receive")
        equal(memory.bytes(), data + bytes(LARGE - size), "the bytes of a message to the library")
        mine.receive_message(LARGE)
        equal(pair.wait(pair.conn.send(source, size)), OK, "a message of the library")
        equal(mine.received.pop(), data, "the bytes of a message of the library")
    memory = pair.engine.memory(bytes(9))
    receive = pair.conn.recv(memory, 9)
    equal(mine.result(mine.send_message(bytes(10)))[0], ERR_TRUNCATED, "a message that is too long for the library")
    equal(pair.conn.wait(receive)[0], ERR_TRUNCATED, "the library's receive of a message that is too long")
    mine.receive_message(8)
    equal(pair.wait(pair.conn.send(memory, 9)), ERR_TRUNCATED, "a message that is too long for the peer")
    equal(mine.received.pop(), None, "the peer's receive of a message that is too long")
    # Given up before a receive was posted: the next message is the one that matches.
    given_up = mine.send_message(b"given up")
    mine.withdraw(given_up, ERR_CANCELED)
    equal(mine.result(given_up)[0] < 0, True, "the Pull after a Withdraw")
    # Given up after one was posted: the Pull crosses the Withdraw.
    receive = pair.conn.recv(memory, 9)
    given_up = mine.send_message(b"given up")
    mine.withdraw(given_up, ERR_CANCELED)
    equal((mine.result(given_up)[0], pair.conn.wait(receive)[0]), (OK, ERR_CANCELED), "a Pull that crosses a Withdraw, and its receive")
    receive = pair.conn.recv(memory, 9)
    equal(mine.result(mine.send_message(b"the next")), (OK, ""), "the message after a Withdraw")
    equal((pair.conn.wait(receive), memory.bytes()), ((OK, 8), b"the next\0"), "the receive after a Withdraw")


def notifications(pair):
    for name, message in ((b"name", b"message"), (b"", b""), (b"large", RANDOM.randbytes(200_000))):
        pair.mine.notify(name, message)
        found = []
        eventually(lambda: found.append(pair.engine.notification()) or found[-1], "a notification to the library")
        equal(found[-1], (name, message), "a notification to the library")
        pair.conn.notify(name, message)
        pair.mine.until(lambda: pair.mine.notifications)
        equal(pair.mine.notifications.pop(), (name, message), "a notification of the library")


def refusals(pair):
    mine, data = pair.mine, RANDOM.randbytes(LARGE)
    memory = pair.engine.memory(data, READ)
    item, wrong = Item(memory.item()), Item(memory.item())
    wrong.token = bytes(16)
    equal(mine.result(mine.read([(wrong, 0, 10)]))[0], ERR_REMOTE_ACCESS, "a read with a wrong token")
    equal(mine.result(mine.read([(item, LARGE - 9, 10)]))[0], ERR_REMOTE_ACCESS, "a read out of bounds")
    equal(mine.result(mine.write_with_data([(item, 0, 10)], bytes(10)))[0], ERR_REMOTE_ACCESS, "a write with its data, without access")
    equal(mine.result(mine.write([(item, 0, LARGE)], bytes(LARGE)))[0], ERR_REMOTE_ACCESS, "a write without access")
    number = mine.request(F_WRITE, [(item, 0, LARGE)])
    mine.send_chunks(number, True, bytes(LARGE), [LARGE], most=2)
    equal(mine.result(number)[0], ERR_REMOTE_ACCESS, "a write without access, of which two chunks were announced")
    mine.cancel(number)
    equal(mine.result(mine.read([(item, 0, LARGE)])), (OK, data), "the bytes after refused writes")

    region, memory = pair.peer.register(bytearray(data), READ), pair.engine.memory(bytes(LARGE))
    for size in (10, LARGE):
        equal(pair.wait(pair.conn.one_sided("write_vector", memory, [(0, size, region.item())])), ERR_REMOTE_ACCESS, "the library's write")
    equal(region.memory, data, "the bytes after the library's refused writes")
    equal(pair.wait(pair.conn.one_sided("read_vector", memory, [(0, LARGE, region.item())])), OK, "the library's read")
    equal(memory.bytes(), data, "the bytes of the library's read")


def close(pair, by_peer):
    if by_peer:
        pair.mine.close()
        eventually(lambda: pair.conn.status() != OK, "the end of the library's connection")
        equal(pair.conn.status(), ERR_REMOTE_DISCONNECT, "the library's connection after a Bye")
    else:
        pair.conn.destroy()
        fails(lambda: pair.mine.until(lambda: False), OK)


# ---- Cases: each gets the library, whether the peer is the connector, and a folder ----


def exchange(level, key):
    def case(library, connector, folder):
        keys = {"UCCL_TCPX_AUTH_KEY_FILE": key_file(folder, key)} if key else {}
        for by_peer in (True, False):
            # The stricter level counts, so one engine alone asks for it.
            peer = Peer([key] if key else [], protect=level if by_peer else OFF)
            with Pair(library, connector, peer, UCCL_TCPX_PROTECT="off" if by_peer else LEVELS[level], **keys) as pair:
                equal((len(pair.mine.channels), pair.mine.agreed.protect), (2, level), "channels and protection")
                if not by_peer:
                    pair.mine.records.largest = 1000  # records and frames need not end together
                for part in (one_sided_by_peer, one_sided_by_library, messages, notifications, refusals):
                    part(pair)
                close(pair, by_peer)

    return case


def several_keys(library, connector, folder):
    """The connector proves the first key, the listener accepts any. A line's end is no part of a key."""
    listed, single = key_file(folder, b"# two\none: " + KEY + b"\ntwo:" + OTHER_KEY + b"\r\n"), key_file(folder, OTHER_KEY + b"\n")
    peer = Peer([OTHER_KEY] if connector else [OTHER_KEY, KEY])
    for path in (listed, single):
        with Pair(library, connector, peer, UCCL_TCPX_AUTH_KEY_FILE=path) as pair:
            notifications(pair)


def handshakes_that_fail(library, connector, folder):
    keyed = {"UCCL_TCPX_AUTH_KEY_FILE": key_file(folder, KEY)}
    for peer, settings, status in (
        (Peer([OTHER_KEY]), keyed, ERR_AUTH),
        (Peer([KEY]), {}, ERR_AUTH),
        (Peer(), keyed, ERR_AUTH),
        (Peer(plugin=b"tcpx"), {}, ERR_UNSUPPORTED),
    ):
        fails(lambda: Pair(library, connector, peer, **settings), status)
    if not connector:
        return
    fails(lambda: Pair(library, True, Peer(channels=65)), ERR_PROTOCOL)
    engine = Engine(library)
    zero = session.Noise(session.clear_bytes(session.OPENING, 0, 120))
    zero.ephemeral(bytes(32))
    for opening in (
        session.clear_bytes(session.OPENING, 0, 8, version=4) + bytes(8),
        session.clear_bytes(session.OPENING, 0, 120) + bytes(32) + zero.seal(bytes(72)),
        session.clear_bytes(session.OPENING, 0, 120) + bytes(120),
    ):
        with socket.create_connection(engine.address(), SECONDS) as sock:
            sock.sendall(opening)
            fails(lambda: session.read_message(sock, session.ANSWER, 0), ERR_PROTOCOL)
    engine.destroy()


def other_nics(library, connector, folder):
    """Channels are joined by the names of their NICs first: the peer's second offer becomes channel 0. It has one offer more."""
    with Pair(library, connector, Peer(nics=[b"another", b"lo", b"others"])) as pair:
        equal(len(pair.mine.channels), 2, "channels")
        one_sided_by_peer(pair)
        one_sided_by_library(pair)


def some_channels(library, connector, folder):
    """Frames number all channels; those that did not come up are lost from the start."""
    peer = Peer(channels=4, up=lambda number: number % 2)
    with Pair(library, connector, peer, UCCL_TCPX_NUM_CHANNELS=4) as pair:
        equal([channel is not None for channel in pair.mine.channels], [False, True, False, True], "channels")
        one_sided_by_peer(pair)
        one_sided_by_library(pair)


def many_segments(library, connector, folder):
    """A chunk crosses at most 4,096 segments; frames are longer than records."""
    count, length = 5000, 7
    with Pair(library, connector, Peer(chunk=1 << 20)) as pair:
        data = RANDOM.randbytes(count * length)
        memory, region = pair.engine.memory(bytes(2 * count * length)), pair.peer.register(bytearray(2 * count * length))
        item = Item(memory.item())
        segments = [(item, 2 * length * i, length) for i in range(count)]
        equal(pair.mine.result(pair.mine.write(segments, data)), (OK, ""), "a write of many segments")
        equal(b"".join(memory.bytes()[at : at + length] for _, at, _ in segments), data, "the bytes of a write of many segments")
        equal(pair.mine.result(pair.mine.read(segments)), (OK, data), "a read of many segments")
        source, target = pair.engine.memory(data), pair.engine.memory(bytes(count * length))
        there = [(length * i, length, region.item(2 * length * i)) for i in range(count)]
        equal(pair.wait(pair.conn.one_sided("write_vector", source, there)), OK, "the library's write of many segments")
        equal(b"".join(bytes(region.memory[at : at + length]) for _, at, _ in segments), data, "the bytes of the library's write")
        equal(pair.wait(pair.conn.one_sided("read_vector", target, there)), OK, "the library's read of many segments")
        equal(target.bytes(), data, "the bytes of the library's read")


def heartbeats(library, connector, folder):
    with Pair(library, connector, Peer(timeout_ms=800)) as pair:
        end = time.monotonic() + 2 * 0.8
        pair.mine.until(lambda: time.monotonic() > end)
        equal(pair.mine.pings > 2, True, "pings in two peer timeouts")
        notifications(pair)
        eventually(lambda: pair.conn.status() != OK, "the end of a connection whose peer is silent")
        fails(lambda: pair.mine.until(lambda: False), ERR_REMOTE_DISCONNECT)


def withdrawn(library, connector, folder):
    """The library gives up a send that meets no receive."""
    with Pair(library, connector, Peer(), UCCL_TCPX_MATCH_TIMEOUT_MS=500) as pair:
        memory = pair.engine.memory(b"given up")
        equal(pair.wait(pair.conn.send(memory, 8)), ERR_TIMED_OUT, "a send that meets no receive")
        pair.conn.notify(b"", b"after the Withdraw")
        pair.mine.until(lambda: pair.mine.notifications)
        equal(pair.mine.messages, deque(), "messages after a Withdraw")
        pair.mine.receive_message(8)
        again = pair.conn.send(memory, 8)
        equal((pair.wait(again), pair.mine.received), (OK, [b"given up"]), "the message after a Withdraw")


def invited(library, connector, folder):
    """The library would meet processes of this host; the peer does not."""
    with Pair(library, connector, Peer(), UCCL_P2P_DISABLE_IPC=0) as pair:
        one_sided_by_peer(pair)
        one_sided_by_library(pair)


class Direct(Pair):
    """A pair of processes that have met. Frames that move bytes fail."""

    def __init__(self, library, connector):
        super().__init__(library, connector, Peer(direct=True), UCCL_P2P_DISABLE_IPC=0)
        for kind in (F_WRITE, F_WRITE_DATA, F_READ, F_READ_DATA, F_CHUNKS, F_DONE):
            del self.mine.handlers[kind]


def directly(library, connector, folder):
    """Host memory moves between the processes, without a chunk."""
    with Direct(library, connector) as pair:
        mine, host, data, other = pair.mine, pair.mine.host, RANDOM.randbytes(LARGE), RANDOM.randbytes(LARGE)
        one_sided_by_library(pair)
        equal(len(host.claimed), 1, "claims of one region")
        memory = pair.engine.memory(data)
        item = Item(memory.item())
        equal(host.read(item, 0, LARGE), data, "a direct read")
        equal((host.write(item, 0, other), memory.bytes()), (True, other), "a direct write")
        equal((host.write(item, 7, b"short"), host.read(item, 0, LARGE)), (True, other[:7] + b"short" + other[12:]), "both, after each other")
        # Some rounds of the ring, with its end inside of a record.
        length = 64
        for _ in range(100):
            source = bytearray(RANDOM.randbytes(1000 * length))
            blocks = [(address_of(source) + length * n, item.address + length * (999 - n), length) for n in range(1000)]
            mine.stay_alive()
            equal(host.outcome(host.order(*host.claim(item), blocks, source)), True, "an order of 1,000 blocks")
            wanted = b"".join(bytes(source[length * n : length * (n + 1)]) for n in reversed(range(1000)))
            equal(memory.bytes()[: 1000 * length], wanted, "the bytes of an order of 1,000 blocks")
        messages_directly(pair)
        equal((mine.arrived, [(lane.first, len(lane.sent)) for lane in mine.lanes]), (0, [(0, 0)] * 2), "bytes and chunks on channels")
        close(pair, True)


def messages_directly(pair):
    """Each lands in the posted buffer, under a grant of its own."""
    mine = pair.mine
    for size in (1, 8193, LARGE):
        data = RANDOM.randbytes(size)
        memory, source = pair.engine.memory(bytes(LARGE)), pair.engine.memory(data)
        receive = pair.conn.recv(memory, LARGE)
        equal(mine.result(mine.send_message(data)), (OK, ""), "a message to the library")
        equal(pair.wait(receive), OK, "the library's receive")
        equal(memory.bytes(), data + bytes(LARGE - size), "the bytes of a message to the library")
        mine.receive_message(LARGE)
        equal(pair.wait(pair.conn.send(source, size)), OK, "a message of the library")
        equal(mine.received.pop(), data, "the bytes of a message of the library")


def lying_claims(library, connector, folder):
    """A claim without the token gets nothing, on either side, and a grant allows what it says and no more."""
    data = RANDOM.randbytes(LARGE)
    with Direct(library, connector) as pair:
        host, memory = pair.mine.host, pair.engine.memory(data, READ)
        item = Item(memory.item())
        fails(lambda: host.claim(item, bytes(16)), ERR_REMOTE_ACCESS)
        equal(host.read(item, 0, LARGE), data, "a read after a claim that was refused")
        equal(host.write(item, 0, bytes(LARGE)), False, "a write without access")
        slot, generation = host.claim(item)
        source = bytearray(9)
        wrong = host.order(slot, generation + 1, [(address_of(source), item.address, 9)], source)
        equal(host.outcome(wrong), False, "an order under a grant that does not stand")
        equal(memory.bytes(), data, "the bytes after refused orders")
        region, target = pair.peer.register(bytearray(data)), pair.engine.memory(bytes(LARGE))
        forged = bytearray(region.item())
        forged[32] ^= 1
        for call in ("read_vector", "write_vector"):
            equal(pair.wait(pair.conn.one_sided(call, target, [(0, LARGE, bytes(forged))])), ERR_REMOTE_ACCESS, call)
            equal((target.bytes(), region.memory), (bytes(LARGE), data), "the bytes after a claim that was refused")
        equal(pair.wait(pair.conn.one_sided("read_vector", target, [(0, LARGE, region.item())])), OK, "a read after it")
        equal(target.bytes(), data, "the bytes of a read after it")

    def outside(host, item):
        source = bytearray(10)
        host.order(*host.claim(item), [(address_of(source), item.address + LARGE - 9, 10)], source)

    def again(host, item):
        host.claim(item)
        host.send_claim(item.region, item.token)

    for lie in (outside, again, lambda host, item: host.sock.send(b"\x63")):
        with Direct(library, connector) as pair:
            memory = pair.engine.memory(data)
            lie(pair.mine.host, Item(memory.item()))
            pair.mine.host.step = lambda: None
            fails(lambda: pair.mine.until(lambda: False), ERR_PROTOCOL)
            equal((pair.conn.status(), memory.bytes()), (ERR_PROTOCOL, data), "the library's connection after a lie, and its memory")


def violation(library, connector, folder):
    with Pair(library, connector, Peer()) as pair:
        pair.mine.send(16)
        fails(lambda: pair.mine.until(lambda: False), ERR_PROTOCOL)
        equal(pair.conn.status(), ERR_PROTOCOL, "the library's connection after an unknown frame")


MUCH, DROP = 3_000_001, 40  # enough bytes for all channels, and chunks before a channel is reset


def lossy(library, connector, level=OFF):
    """A connection of three channels with short chunks."""
    return Pair(library, connector, Peer(channels=3, chunk=16_384, protect=level), UCCL_TCPX_NUM_CHANNELS=3)


def lost(pair, resent):
    """One channel is lost in both engines. `resent`: who may have sent chunks again, 0 the peer and 1 the library. Returns how many: none if the
    channel that was reset had nothing under way, as on a busy machine."""
    mine = pair.mine
    mine.until(lambda: any(lane.lost is not None for lane in mine.lanes))
    states = sorted((lane.closed, lane.said, lane.lost is not None) for lane in mine.lanes)
    equal(states, [(False,) * 3] * 2 + [(True,) * 3], "lost channels")
    equal((mine.drop, mine.resent[1 - resent]), (None, 0), "chunks sent again")
    return mine.resent[resent]


def lost_channels(library, connector, folder):
    """A channel is reset in the middle of each kind of transfer. Either engine notices it first."""
    resent = {"write of the library": 0, "read of the library": 0, "write": 0, "read": 0}
    for silent, level in ((False, OFF), (True, OFF), (False, ENCRYPT), (True, INTEGRITY)):
        data = RANDOM.randbytes(MUCH)

        def dropping(pair):
            pair.mine.silent, pair.mine.drop = silent, DROP
            return pair.mine

        with lossy(library, connector, level) as pair:
            region, source = pair.peer.register(bytearray(MUCH)), pair.engine.memory(data)
            dropping(pair)
            equal(pair.wait(pair.conn.one_sided("write_vector", source, [(0, MUCH, region.item())])), OK, "the library's write")
            equal(region.memory, data, "the bytes of the library's write")
            resent["write of the library"] += lost(pair, 1)
            one_sided_by_library(pair)
        with lossy(library, connector, level) as pair:
            region, target = pair.peer.register(bytearray(data)), pair.engine.memory(bytes(MUCH))
            dropping(pair)
            equal(pair.wait(pair.conn.one_sided("read_vector", target, [(0, MUCH, region.item())])), OK, "the library's read")
            equal(target.bytes(), data, "the bytes of the library's read")
            resent["read of the library"] += lost(pair, 0)
            one_sided_by_peer(pair)
        with lossy(library, connector, level) as pair:
            memory = pair.engine.memory(bytes(MUCH))
            mine = dropping(pair)
            equal(mine.result(mine.write([(Item(memory.item()), 0, MUCH)], data)), (OK, ""), "a write")
            equal(memory.bytes(), data, "the bytes of a write")
            resent["write"] += lost(pair, 0)
            messages(pair)
        with lossy(library, connector, level) as pair:
            memory = pair.engine.memory(data)
            mine = dropping(pair)
            equal(mine.result(mine.read([(Item(memory.item()), 0, MUCH)])), (OK, data), "a read")
            resent["read"] += lost(pair, 1)
            refusals(pair)
    equal([kind for kind, count in resent.items() if not count], [], "kinds of transfers of which no chunk was sent again")


def restored_channels(library, connector, folder):
    """Lost channels come back, and carry data both ways; again and again. Joins that are wrong are refused and change nothing."""
    if not connector:
        return
    key = key_file(folder, KEY)
    for level, keys, settings in ((OFF, (), {}), (ENCRYPT, (KEY,), {"UCCL_TCPX_AUTH_KEY_FILE": key})):
        peer = Peer(keys, channels=3, chunk=16_384, protect=level)
        with Pair(library, connector, peer, UCCL_TCPX_NUM_CHANNELS=3, **settings) as pair:
            mine, address = pair.mine, pair.engine.address()
            fails(lambda: mine.join(address, 1, [1]), ERR_UNSUPPORTED)  # it is not lost
            for generation, numbers in ((2, [1]), (7, [0, 1])):
                for number in numbers:
                    mine.lose(number)
                mine.until(lambda: all(mine.lanes[number].lost is not None for number in numbers))
                one_sided_by_peer(pair)
                if generation > 2:
                    fails(lambda: mine.join(address, 2, numbers), ERR_UNSUPPORTED)  # the generation was before
                old, mine.session = mine.session, Pair.session_of(library, peer, settings)
                fails(lambda: mine.join(address, generation, numbers), ERR_NOT_FOUND)  # another connection
                mine.session = old
                mine.join(address, generation, numbers)
                one_sided_by_peer(pair)
                one_sided_by_library(pair)
                messages(pair)
                equal([lane.closed for lane in mine.lanes], [False] * 3, "lost channels")


def moved_control(library, connector, folder):
    """The control connection goes on over another socket, again and again. What was lost with the old one is sent again, both ways. A lie
    about it ends the connection."""
    if not connector:
        return
    with Pair(library, connector, Peer(channels=3, chunk=16_384), UCCL_TCPX_NUM_CHANNELS=3) as pair:
        mine, address = pair.mine, pair.engine.address()
        for generation in range(1, 4):
            void, end = socket.socketpair()
            old, mine.records.sock = mine.records.sock, void
            mine.notify(b"lost", bytes([generation]))
            for i in range(3):
                pair.conn.notify(b"unread", bytes([generation, i]))
            mine.move(address, generation)
            eventually(lambda: pair.engine.notification() == (b"lost", bytes([generation])), "a notification sent again")
            mine.until(lambda: len(mine.notifications) == 3)
            equal(mine.notifications, [(b"unread", bytes([generation, i])) for i in range(3)], "notifications of the library")
            mine.notifications.clear()
            for part in (one_sided_by_peer, one_sided_by_library, messages, notifications):
                part(pair)
            fails(lambda: mine.move(address, generation), ERR_UNSUPPORTED)  # the generation was before
            for sock in (old, void, end):
                sock.close()
    for lie in (0, 1 << 40):
        with Pair(library, connector, Peer()) as pair:
            one_sided_by_library(pair)
            address = pair.engine.address()
            pair.mine.move(address, 1, opened=lie)
            fails(lambda: pair.mine.until(lambda: False), ERR_REMOTE_DISCONNECT)


def all_channels(library, connector, folder):
    """The second loss is in the middle of what the first one left; then the last channel goes too."""
    data = RANDOM.randbytes(MUCH)
    with lossy(library, connector) as pair:
        mine, memory, region = pair.mine, pair.engine.memory(bytes(MUCH)), pair.peer.register(bytearray(MUCH))
        for _ in range(2):
            mine.drop = DROP
            number = mine.write([(Item(memory.item()), 0, MUCH)], data)
            if not mine.lanes[2].closed:
                mine.until(lambda: any(lane.lost is not None for lane in mine.lanes))
            equal(mine.result(number), (OK, ""), "a write")
            equal(memory.bytes(), data, "the bytes of a write")
            data = data[::-1]
        equal([lane.closed for lane in mine.lanes].count(True), 2, "lost channels")
        one_sided_by_peer(pair)
        one_sided_by_library(pair)
        source = pair.engine.memory(data)
        mine.drop, mine.silent = DROP, True
        number = pair.conn.one_sided("write_vector", source, [(0, MUCH, region.item())])
        mine.until(lambda: all(lane.lost is not None for lane in mine.lanes))
        equal(pair.conn.status(), OK, "the library's connection without channels")
        if connector:
            # What the last channel did not deliver waits for one that comes back.
            mine.silent = False
            mine.join(pair.engine.address(), 1, [0, 1, 2])
            equal(pair.wait(number), OK, "a write of the library that waited for a channel")
            equal(region.memory, data, "the bytes of a write of the library that waited for a channel")
            one_sided_by_peer(pair)


def lost_channels_of_refused_writes(library, connector, folder):
    """Nothing is sent again; one Cancel ends what a lost channel did not deliver."""
    data = RANDOM.randbytes(MUCH)
    with lossy(library, connector) as pair:
        mine, memory = pair.mine, pair.engine.memory(data, READ)
        mine.drop = DROP
        number = mine.write([(Item(memory.item()), 0, MUCH)], bytes(MUCH))
        mine.until(lambda: number in mine.results)
        mine.until(lambda: any(lane.lost is not None for lane in mine.lanes))
        equal((mine.result(number)[0], mine.cancelled), (ERR_REMOTE_ACCESS, {number}), "a refused write, and its Cancel")
        equal((memory.bytes(), mine.resent), (data, [0, 0]), "the bytes after a refused write, and chunks sent again")
        one_sided_by_peer(pair)
    with lossy(library, connector) as pair:
        mine, region, source = pair.mine, pair.peer.register(bytearray(data), READ), pair.engine.memory(bytes(MUCH))
        mine.drop = 3
        number = pair.conn.one_sided("write_vector", source, [(0, MUCH, region.item())])
        equal(pair.wait(number), ERR_REMOTE_ACCESS, "the library's refused write")
        mine.until(lambda: any(lane.lost is not None for lane in mine.lanes) and mine.cancels)
        equal((region.memory, mine.resent, len(mine.cancels)), (data, [0, 0], 1), "the bytes after the library's refused write, and its Cancel")
        one_sided_by_library(pair)


def lies_about_channels(library, connector, folder):
    """Each ends the connection."""

    def write(pair):
        """A write of which two chunks are announced; the others come never."""
        memory = pair.engine.memory(bytes(MUCH))
        number = pair.mine.request(F_WRITE, [(Item(memory.item()), 0, MUCH)])
        pair.mine.send_chunks(number, True, bytes(MUCH), [MUCH], most=2)
        return number, memory

    def again(pair):
        number, _ = write(pair)
        pair.mine.announce(number, True, 0, [bytes(16_384)])

    def beyond(pair):
        number, _ = write(pair)
        pair.mine.announce(number, True, 3 * 16_384, [bytes(16_384)])

    def on_lost_channel(pair):
        number, _ = write(pair)
        pair.mine.lose(2)
        pair.mine.send(F_CHUNKS, struct.pack("<QIIQ", number, True, 1, 2 * 16_384), struct.pack("<IHH", 16_384, 2, 0))

    def out_of_hole(pair):
        """A chunk that begins in a hole, and is longer."""
        number, _ = write(pair)
        pair.mine.send(F_CHUNKS, struct.pack("<QIIQ", number, True, 2, 2 * 16_384), *[struct.pack("<IHH", 10, 2, 0)] * 2)
        pair.mine.lose(2)
        lane = pair.mine.lanes[2]
        pair.mine.recover = lambda channel: pair.mine.announce(number, True, 2 * 16_384, [bytes(11)])
        pair.mine.until(lambda: lane.lost is not None)

    def arrived(*counts):
        return lambda pair: [pair.mine.send(F_ARRIVED, struct.pack("<QI", *count)) for count in counts]

    for lie in (
        lambda pair: pair.mine.lose(1, count=1),
        lambda pair: (pair.mine.lose(1), pair.mine.lose(1)),
        lambda pair: (pair.mine.lose(1), arrived((0, 1))(pair)),
        lambda pair: pair.mine.send(F_LOST, struct.pack("<QI", 0, 3), b""),
        arrived((1, 0)),
        arrived((0, 3)),
        arrived((0, 1 << 16)),
        again,
        beyond,
        on_lost_channel,
        out_of_hole,
    ):
        with lossy(library, connector) as pair:
            lie(pair)
            fails(lambda: pair.mine.until(lambda: False), ERR_PROTOCOL)
            equal(pair.conn.status(), ERR_PROTOCOL, "the library's connection after a lie")


def idle_channels(library, connector, folder):
    """Channels that end while nothing moves cost no transfer, with or without a word of the peer."""

    def word(mine):
        mine.lose(1)

    def reset(mine):
        mine.close_channel(1)

    def end(mine):
        """Nothing more comes from the peer, which still receives."""
        mine.channels[1].out.sock.shutdown(socket.SHUT_WR)
        mine.lanes[1].closed = True

    for ends in (word, reset, end):
        for before in (True, False):
            with lossy(library, connector) as pair:
                if before:
                    one_sided_by_library(pair)
                ends(pair.mine)
                for part in (one_sided_by_peer, one_sided_by_library, messages, notifications, refusals):
                    part(pair)


def losses_without_an_answer(library, connector, folder):
    """A peer that never says Lost runs into the library's transfer timeout."""
    with Pair(library, connector, Peer(channels=3, chunk=16_384), UCCL_TCPX_NUM_CHANNELS=3, UCCL_TCPX_TRANSFER_TIMEOUT_MS=700) as pair:
        region, source = pair.peer.register(bytearray(MUCH)), pair.engine.memory(bytes(MUCH))
        pair.mine.drop, pair.mine.silent = DROP, True
        pair.mine.handlers[F_LOST] = lambda fields: (fields.unpack("QI"), fields.rest())
        number = pair.conn.one_sided("write_vector", source, [(0, MUCH, region.item())])
        fails(lambda: pair.mine.until(lambda: False), ERR_TIMED_OUT)
        equal(pair.conn.wait(number)[0], ERR_TIMED_OUT, "the library's write")


def reads_without_reports(library, connector, folder):
    """A reader that does not say what is in place runs into the library's transfer timeout."""
    with Pair(library, connector, Peer(), UCCL_TCPX_TRANSFER_TIMEOUT_MS=700) as pair:
        data = RANDOM.randbytes(LARGE)
        memory = pair.engine.memory(data)
        pair.mine.report = lambda: None
        equal(pair.mine.result(pair.mine.read([(Item(memory.item()), 0, LARGE)])), (OK, data), "a read")
        fails(lambda: pair.mine.until(lambda: False), ERR_TIMED_OUT)


def next_keys(library, connector, folder):
    """More messages than a key of a channel seals, and more records than a key of the control connection."""
    with Pair(library, connector, Peer(channels=1, chunk=4096), UCCL_TCPX_PROTECT="encrypt") as pair:
        data = RANDOM.randbytes(4096 * 16_500)
        memory = pair.engine.memory(data)
        item = Item(memory.item())
        equal(pair.mine.result(pair.mine.read([(item, 0, len(data))])), (OK, data), "a read of 16,500 chunks")
        data = data[::-1]
        equal(pair.mine.result(pair.mine.write([(item, 0, len(data))], data)), (OK, ""), "a write of 16,500 chunks")
        equal(memory.bytes(), data, "the bytes of a write of 16,500 chunks")
        pair.mine.records.largest = 1
        pair.mine.notify(b"", data[:65_600])
        eventually(lambda: pair.engine.notification() == (b"", data[:65_600]), "a notification in 65,600 records")
        while pair.mine.records.into.number < 65_600:
            pair.conn.notify(b"n", b"")
            pair.mine.until(lambda: pair.mine.notifications)
            equal(pair.mine.notifications.pop(), (b"n", b""), "one of 65,600 notifications")


def key_file(folder, contents):
    path = os.path.join(folder, f"key{len(os.listdir(folder))}")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(contents)
    return path


CASES = {f"{name}, {'a' if key else 'no'} key": exchange(level, key) for level, name in LEVELS.items() for key in (None, KEY)}
LOSSES = (lost_channels, restored_channels, moved_control, all_channels, lost_channels_of_refused_writes, lies_about_channels)
LOSSES += (idle_channels, losses_without_an_answer, reads_without_reports)
OTHERS = (several_keys, handshakes_that_fail, other_nics, some_channels, many_segments, heartbeats, withdrawn, invited, violation, next_keys)
OTHERS += (directly, lying_claims)
for _case in LOSSES + OTHERS:
    CASES[_case.__name__.replace("_", " ")] = _case


def main():
    library, words = Library(sys.argv[1]), sys.argv[2:]
    failed = 0
    for name, connector in [(name, connector) for name in CASES for connector in (True, False)]:
        full = f"{name}: {'connector' if connector else 'listener'}"
        if words and not any(word in full for word in words):
            continue
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                CASES[name](library, connector, folder)
            print(f"ok      {full} ({time.monotonic() - start:.2f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {full}\n{traceback.format_exc()}", flush=True)
    print(f"{failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
