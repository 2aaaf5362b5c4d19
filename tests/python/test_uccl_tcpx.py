"""Tests uccl_tcpx between two processes, over host memory. Run by run.sh; arguments: words, of which a case's name must contain one."""

import array
import ast
import asyncio
import ctypes
import gc
import glob
import hashlib
import inspect
import mmap
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import uccl_tcpx
from peer import LIMIT, Peer, Skip, case, descriptors, main, pair, pattern, raises
from uccl_tcpx import ConnectionLost, InvalidArgument, TimedOut, UcclError, p2p

try:
    import numpy
except ImportError:
    numpy = None
try:
    import torch
except ImportError:
    torch = None

SIZE = 1 << 20
REFUSED, TRUNCATED, CANCELED, NOT_FOUND = -20, -21, -5, -2


class Tensor:
    """What torch's tensors have, in host memory."""

    def __init__(self, size, contiguous=True):
        self.memory, self.contiguous = (ctypes.c_uint32 * (size // 4))(), contiguous

    def data_ptr(self):
        return ctypes.addressof(self.memory)

    def numel(self):
        return len(self.memory)

    def element_size(self):
        return 4

    def is_contiguous(self):
        return self.contiguous


class GpuArray:
    """What arrays in GPU memory have, in host memory."""

    def __init__(self, size, strides=None):
        self.memory = bytearray(size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size // 8, 4), "typestr": "<i2", "strides": strides, "version": 3}


# ---- what an endpoint is ----


@case
def an_endpoint_has_metadata_and_ends():
    with p2p.Endpoint() as endpoint:
        ip, port, gpu = p2p.Endpoint.parse_metadata(endpoint.get_metadata())
        assert ip == "127.0.0.1" and 0 < port < 65536 and gpu, (ip, port, gpu)
        assert f"{ip}:{port}" in repr(endpoint) and not endpoint.closed
        assert p2p.Endpoint.parse_metadata(b"[fe80::1%eth0]:7?0000:4a:00.0") == ("fe80::1%eth0", 7, "0000:4a:00.0")
    assert endpoint.closed and "closed" in repr(endpoint)
    endpoint.close()
    for call in ("get_metadata", "accept", "get_notifs", "wait_notif", "fileno", "stats_text"):
        assert raises(UcclError, "closed", getattr(endpoint, call)).status == CANCELED
    for call, arguments in (("reg", (bytearray(1),)), ("dereg", (1,)), ("remove_remote_endpoint", (0,)), ("poll_async", (1,)),
                            ("connect", ("127.0.0.1", "", 1)), ("send_notif", (0, b"")), ("write", (0, 1, 1, 1, bytes(64)))):
        raises(UcclError, "closed", getattr(endpoint, call), *arguments)
    raises(InvalidArgument, "NoneType", p2p.Endpoint.parse_metadata, None)
    for text in (b"", b"nonsense", b"1.2.3.4:99999?0", b"1.2.3.4:5"):
        raises(InvalidArgument, "", p2p.Endpoint.parse_metadata, text)


@case
def settings_of_one_endpoint():
    with p2p.Endpoint(0, options={"UCCL_TCPX_NUM_CHANNELS": 2}) as endpoint:
        assert endpoint.get_metadata()
    assert raises(ValueError, "UCCL_TCPX_NUM_CHANNELS", p2p.Endpoint, options={"UCCL_TCPX_NUM_CHANNELS": "many"}).status == -1


@case
def errors_have_a_status_and_a_text():
    with p2p.Endpoint() as endpoint:
        error = raises(ConnectionError, "127.0.0.1", endpoint.connect, "127.0.0.1", "", 1)
    assert isinstance(error, (ConnectionLost, RuntimeError)) and error.status == -11 and error.text in str(error) and "-11" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.status, copy.text) == (type(error), error.status, error.text)


@case
def a_missing_library_is_an_import_error():
    program = "from uccl_tcpx import p2p\np2p.Endpoint()"
    environment = {**os.environ, "LIBUCCL_P2P": "/nonexistent/libuccl_p2p.so"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert done.returncode == 1 and "ImportError: /nonexistent" in done.stderr and "LIBUCCL_P2P" in done.stderr, done.stderr


@case
def an_older_library_lacks_a_function():
    with p2p.Endpoint() as endpoint:
        library = endpoint._core.lib
        missing = library._missing("of_the_future")
        assert raises(UcclError, "uccl_engine_of_the_future|older", missing, 1).status == -4
        assert re.fullmatch(r"\d+\.\d+\.\d+", uccl_tcpx.library_version()) and library.path == uccl_tcpx.library_path()


# ---- connections ----


def await_that(holds):
    until = time.monotonic() + LIMIT
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    assert holds()


@case
def connect_and_accept():
    with pair(connected=False) as (here, other, _):
        target = parsed(other)
        other.begin("call", "accept", LIMIT)
        ok, number = here.connect(*target)
        accepted, address, gpu, there = other.end()
        assert ok is True and accepted is True and address == "127.0.0.1" and isinstance(gpu, int)
        assert here.is_connected(number) and other.call("is_connected", there)
        error = raises(TimedOut, "accept|0.05 s", here.accept, 0.05)
        assert isinstance(error, TimeoutError) and error.status == -10


def parsed(other):
    """The arguments of connect."""
    ip, port, gpu = p2p.Endpoint.parse_metadata(other.metadata())
    return ip, gpu, port


@case
def adding_an_endpoint_twice_is_one_connection():
    with pair() as (here, other, first):
        metadata = other.metadata()
        assert here.add_remote_endpoint(metadata) == (True, first) == here.add_remote_endpoint(bytearray(metadata))
        assert here.remove_remote_endpoint(first) is True and here.remove_remote_endpoint(first) is False
        assert here.remove_remote_endpoint(999999) is False
        ok, second = here.add_remote_endpoint(metadata)
        assert ok and second != first
        raises(UcclError, "Invalid conn_id", here.transfer, first, "write", [], [])
        there = other.call("accept", LIMIT)[3]
        other.call("remove_remote_endpoint", there)
        await_that(lambda: not here.is_connected(second))
        third = here.add_remote_endpoint(metadata)[1]
        assert third != second and here.is_connected(third), "a lost connection is made again"
        assert here.conn_id_of_rank(0) == 2**64 - 1


@case
def passive_accepting_drops_ended_connections():
    with pair(connected=False) as (here, other, _):
        assert here.start_passive_accept() is True and here.start_passive_accept() is True
        counts = []
        for _ in range(3):
            number = other.call("add_remote_endpoint", here.get_metadata())[1]
            await_that(lambda: here._core._connections)
            assert other.call("remove_remote_endpoint", number)
            await_that(lambda: not here._core._connections)
            counts.append(descriptors())
        # The engine keeps what it made for its first connection.
        await_that(lambda: descriptors() <= counts[0])
    here._passive.join(LIMIT)
    assert not here._passive.is_alive()


# ---- what carried bytes ----


def carried(rows):
    """Bytes by carrier and NIC."""
    return {(path.carrier, path.nic): path.bytes for path in rows if path.bytes}


def written(size, options):
    """What carried a write of so many bytes, here and at the peer, which reads none of its own."""
    with pair(options) as (here, other, number):
        there = other.call("accept", LIMIT)[3]
        assert carried(here.paths(number)) == {}, here.paths(number)
        item = other.offer(size)[0]
        block = bytearray(pattern(3, size))
        region = here.reg(block)[1]
        for time in (1, 2):
            assert here.write(number, region, block, None, item)
            expected = time * size
            await_that(lambda: sum(carried(here.paths(number)).values()) == expected)
        await_that(lambda: sum(path[3] for path in other.call("paths", there)) == 2 * size)
        rows = here.paths(number)
        assert here.remove_remote_endpoint(number)
        raises(UcclError, "Invalid conn_id", here.paths, number)
        return carried(rows), rows


@case
def paths_say_what_carried_bytes():
    channels = {"UCCL_P2P_DISABLE_IPC": 1, "UCCL_TCPX_NUM_CHANNELS": 3}
    moved, rows = written(SIZE, channels)
    assert moved == {("tcp", "lo"): 2 * SIZE}, rows
    assert [(path.plugin, path.channels, path.lost) for path in rows] == [("TCPX-soft", 3, 0)], rows
    assert isinstance(rows[0], uccl_tcpx.Path) and rows[0].bytes == rows[0][3]
    assert written(SIZE, {"UCCL_P2P_DISABLE_IPC": 0})[0] in ({("direct", ""): 2 * SIZE}, {("tcp", "lo"): 2 * SIZE})
    assert written(1000, channels)[0] == {("eager", ""): 2000}


@case
def a_transfer_says_what_carried_it():
    over_tcp, eager, direct = (("tcp",), ("lo",)), (("eager",), ()), (("direct",), ())
    for disabled, size, expected in ((1, SIZE, [over_tcp]), (1, 100, [eager]), (0, SIZE, [direct, over_tcp])):
        with pair({"UCCL_P2P_DISABLE_IPC": disabled}) as (here, other, number):
            item, block = other.offer(size)[0], bytearray(pattern(3, size))
            done = here.write_async(number, here.reg(block)[1], block, None, item)[1]
            await_that(lambda: here.progress(done).done)
            path = here.transfer_path(done)
            assert isinstance(path, uccl_tcpx.TransferPath) and path in expected, (path, disabled, size)
            assert here.wait(done) and here.transfer_path(done) == path
            raises(UcclError, "", here.transfer_path, done + 1)


@case
def a_required_path_that_is_missing_fails_the_connect():
    with pair(connected=False) as (_, other, __), p2p.Endpoint(options={"UCCL_TCPX_REQUIRE": "tcpx"}) as picky:
        error = raises(UcclError, "tcpx is required", picky.add_remote_endpoint, other.metadata())
        assert error.status == -4 and "takes" in error.text, error
    raises(InvalidArgument, "UCCL_TCPX_REQUIRE=fast", p2p.Endpoint, options={"UCCL_TCPX_REQUIRE": "fast"})


# ---- reads and writes ----


def kinds():
    """Buffers of SIZE bytes, with how their bytes are read and set."""
    plain = bytearray(SIZE)
    larger = bytearray(2 * SIZE)
    words = array.array("I", bytes(SIZE))
    pages = mmap.mmap(-1, SIZE)
    chars = (ctypes.c_char * SIZE)()
    tensor, gpu = Tensor(SIZE), GpuArray(SIZE)
    view = memoryview(larger)[5 : 5 + SIZE]
    found = [(plain, plain), (view, view), (words, words), (pages, pages), (chars, chars), (tensor, tensor.memory), (gpu, gpu.memory)]
    if numpy is not None:
        numbers = numpy.zeros((SIZE // 1024, 128), dtype=numpy.float64)
        found += [(numbers, numbers), (numpy.zeros(SIZE, dtype=numpy.uint8)[:], None)]
    if torch is not None:
        numbers = torch.zeros(SIZE // 4, dtype=torch.float32)
        found.append((numbers, numbers.numpy()))
    return [(buffer, memoryview(buffer if content is None else content).cast("B")) for buffer, content in found]


@case
def every_kind_of_buffer_is_read_and_written():
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE)
        for seed, (buffer, content) in enumerate(kinds()):
            region = here.reg(buffer)[1]
            content[:] = pattern(seed, SIZE)
            assert here.write(conn, region, buffer, None, item) is True
            assert other.content() == pattern(seed, SIZE), type(buffer)
            content[:] = bytes(SIZE)
            assert here.read(conn, region, buffer, SIZE, item) is True
            assert bytes(content) == pattern(seed, SIZE), type(buffer)
            assert here.dereg(region) is True and here.dereg(region) is False
        if numpy is None:
            print("note: without numpy")


@case
def an_address_and_a_part_of_a_buffer():
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE)
        memory = (ctypes.c_char * SIZE)()
        address = ctypes.addressof(memory)
        region = here.reg(address, SIZE)[1]
        memory[100:104] = b"part"
        assert here.write(conn, region, address + 100, 4, item)
        assert other.content()[:5] == b"part\0"
        assert here.read(conn, region, memoryview(memory)[:4], None, item) and memory[:4] == b"part"
        assert here.reg(memory, 10)[1] > 0
        raises(InvalidArgument, "10 bytes of a buffer of 4", here.reg, bytearray(4), 10)


@case
def transfers_in_the_background():
    with pair() as (here, other, conn):
        items = [other.offer(SIZE)[0] for _ in range(4)]
        source = [bytearray(pattern(i, SIZE)) for i in range(4)]
        regions = here.regv(source)[1]
        started = [here.write_async(conn, *each) for each in zip(regions, source, [None] * 4, items)]
        assert all(ok for ok, _ in started) and len({number for _, number in started}) == 4
        for _, number in started:
            while here.poll_async(number) == (True, False):
                pass
            assert here.poll_async(number) == (True, True), "asked again"
            assert here.progress(number) == (True, SIZE, SIZE)
        assert [other.content(i) for i in range(4)] == source
        number = here.read_async(conn, regions[0], source[0], SIZE, items[3])[1]
        assert here.wait(number, LIMIT) is True and source[0] == source[3]
        raises(UcclError, "", here.poll_async, number + 1000)


@case
def vectors():
    with pair() as (here, other, conn):
        items = [other.offer(100 + i)[0] for i in range(5)]
        source = [bytearray(pattern(i, 100 + i)) for i in range(5)]
        ok, regions = here.regv(source, [len(each) for each in source])
        assert ok is True and here.regv([], []) == (True, [])
        assert here.writev(conn, regions, source, [len(each) for each in source], items, 5) is True
        assert [other.content(i) for i in range(5)] == source
        back = [bytearray(100 + i) for i in range(5)]
        into = here.regv(back)[1]
        number = here.readv_async(conn, into, back, None, items)[1]
        assert here.wait(number) and back == source
        ok, advertised = here.advertisev(into, back, None, 5)
        assert ok and [len(item) for item in advertised] == [64] * 5
        for call in (here.writev, here.readv):
            raises(RuntimeError, "All input vectors/lists must have length num_iovs (5): ", call, conn, regions, source, [1], items, 5)
            raises(RuntimeError, "num_iovs", call, conn, regions, source, None, items, 4)
            raises(RuntimeError, "64 bytes", call, conn, regions, source, None, [b"short"] * 5, 5)
            raises(RuntimeError, "without segments", call, conn, [], [], [], [], 0)
        raises(RuntimeError, "must match", here.regv, source, [1])


@case
def a_failed_registration_of_several_registers_none():
    with p2p.Endpoint() as here:
        raises(InvalidArgument, "", here.regv, [bytearray(10), bytearray(0)])
        assert not here._core._regions


# ---- what buffers are protected against ----


@case
def a_buffer_is_kept_until_it_is_deregistered():
    with pair() as (here, other, conn):
        class Kept(bytearray):
            pass

        item, _ = other.offer(SIZE)
        buffer = Kept(pattern(1, SIZE))
        address, lost = p2p.memory_of(buffer).addr, weakref.ref(buffer)
        region = here.reg(buffer)[1]
        raises(BufferError, "", buffer.append, 1)
        del buffer
        gc.collect()
        assert lost() is not None
        assert here.write(conn, region, address, SIZE, item) and other.content() == pattern(1, SIZE)
        here.dereg(region)
        assert lost() is None
        tensor = Tensor(SIZE)
        lost = weakref.ref(tensor)
        descs = here.register_memory([tensor])
        del tensor
        assert lost() is not None
        here.deregister_memory(descs)
        assert lost() is None
        closing = Tensor(SIZE)
        lost = weakref.ref(closing)
        here.reg(closing)
        del closing
        assert lost() is not None
    assert lost() is None, "the end of the endpoint lets go"


@case
def deregistering_waits_for_transfers():
    with pair() as (here, other, conn):
        item, _ = other.offer(32 << 20)
        source = bytearray(os.urandom(32 << 20))
        digest = hashlib.sha256(source).digest()
        region = here.reg(source)[1]
        number = here.write_async(conn, region, source, None, item)[1]
        assert here.dereg(region) is True
        source[:] = bytes(32 << 20)
        assert here.poll_async(number) == (True, True) and other.digest() == digest


@case
def read_only_buffers():
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE, 5)
        fixed = pattern(6, SIZE)
        region = here.reg(fixed)[1]
        raises(InvalidArgument, "read-only", here.read, conn, region, fixed, None, item)
        raises(InvalidArgument, "read-only", here.recv, conn, region, fixed)
        raises(InvalidArgument, "read-only", here.readv, conn, [region], [fixed], None, [item])
        assert here.write(conn, region, fixed, None, item) and other.content() == fixed
        # Nor does a peer write into it.
        there = other.call("accept", LIMIT)[3]
        mine = here.advertise(region, fixed)[1]
        _, theirs = other.offer(SIZE, 7)
        error = raises(UcclError, "", other.call, "write", there, theirs, *other.address(), mine)
        assert error.status == REFUSED and fixed == pattern(6, SIZE)
        assert other.call("read", there, theirs, *other.address(), mine) is True and other.content() == fixed


@case
def access_rights():
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE, 1, access=p2p.ACCESS_REMOTE_READ)
        mine = bytearray(SIZE)
        region = here.reg(mine)[1]
        assert here.read(conn, region, mine, None, item) and mine == pattern(1, SIZE)
        assert raises(UcclError, "", here.write, conn, region, mine, None, item).status == REFUSED
        with here.registered(mine) as scoped:
            assert (scoped.size, len(scoped.item)) == (SIZE, 64) and here.read(conn, scoped.mr_id, scoped.addr, scoped.size, item)
        raises(UcclError, "Invalid mr_id", here.read, conn, scoped.mr_id, mine, None, item)


@case
def misuse_is_an_error():
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE)
        good = bytearray(SIZE)
        region = here.reg(good)[1]
        for bad in (None, object(), "text", 1.5, [1], 123):
            raises(InvalidArgument, "", here.reg, bad)
            raises(InvalidArgument, "", here.register_memory, [good, bad])
        for pointer, size in ((0, 10), (-1, 10), (1 << 64, 1), (2**64 - 1, 10), (4096, -1), (4096, 0), (good, -1)):
            raises(InvalidArgument, "", here.reg, pointer, size)
        raises(InvalidArgument, "not contiguous", here.reg, memoryview(good)[::2])
        raises(InvalidArgument, "not contiguous", here.reg, Tensor(64, contiguous=False))
        raises(InvalidArgument, "not contiguous", here.reg, GpuArray(64, strides=(16, 2)))
        assert here.reg(GpuArray(64, strides=(8, 2)))[0]
        if numpy is not None:
            raises(InvalidArgument, "not contiguous", here.reg, numpy.zeros((8, 8))[:, 1])
            assert here.reg(numpy.zeros(8), numpy.int64(64))[0]
        outside = bytearray(10)
        for call in (here.write, here.read):
            raises(InvalidArgument, "", call, conn, region, outside, None, item)
            raises(UcclError, "Invalid conn_id 99", call, 99, region, good, None, item)
            raises(UcclError, "", call, conn, region + 1000, good, None, item)
            raises(InvalidArgument, "64 bytes", call, conn, region, good, None, item[:63])
            for bad in (64, 1 << 50, None, [0] * 64):
                raises(InvalidArgument, "in the place of bytes", call, conn, region, good, None, bad)
            assert raises(UcclError, "", call, conn, region, good, None, bytes(64)).status in (-1, REFUSED)
        assert raises(UcclError, "", here.write, conn, region, good, None, item[:-1] + bytes([item[-1] ^ 1])).status in (-1, REFUSED)
        for call in (here.poll_async, here.wait, here.progress):
            assert raises(UcclError, "Invalid", call, 12345 << 40 | 1).status == NOT_FOUND
            raises(UcclError, "Invalid transfer_id", call, 1 << 62 | 999)
        raises(UcclError, "not needed", here.connect_local, "0000:4a:00.0")
        raises(UcclError, "not needed", here.write_ipc_async, conn, 0, 1, b"")
        assert here.write(conn, region, good, None, item), "the endpoint still works"


# ---- two-sided messages ----


@case
def messages():
    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        buffer = bytearray(pattern(1, SIZE))
        region = here.reg(buffer)[1]
        for size in (SIZE, 1, 0, 4096):
            other.begin("receive", there, SIZE)
            assert here.send(conn, region, buffer, size) is True
            assert other.end() == buffer[:size]
        other.send(there, b"answer")
        number = here.recv_async(conn, region, buffer, 100)[1]
        assert here.wait(number, LIMIT) and here.progress(number).total == 6 and buffer[:6] == b"answer"
        other.send(there, pattern(9, 200))
        assert raises(UcclError, "", here.recv, conn, region, buffer, 100).status == TRUNCATED


@case
def messages_of_several_buffers():
    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        parts = [bytearray(pattern(i, 1000 * (i + 1))) for i in range(4)]
        regions = here.regv(parts)[1]
        number = here.sendv_async(conn, regions, parts, None, 4)[1]
        assert here.poll_async(number) == (True, False) and here.wait(number, 0.01) is False
        assert [other.receive(there, 1 << 20) for _ in parts] == parts
        assert here.wait(number, LIMIT) is True
        raises(UcclError, "Invalid transfer_id", here.poll_async, number)
        into = [bytearray(1000 * (i + 1)) for i in range(4)]
        number = here.recvv_async(conn, here.regv(into)[1], into)[1]
        for part in parts:
            other.send(there, bytes(part))
        await_that(lambda: here.progress(number).done)
        assert here.progress(number).total == 10000 and here.wait(number, 0) is True and into == parts
        assert not here._core._together


@case
def messages_of_several_buffers_stay_together():
    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        count, started = 24, []

        def send(sender):
            parts = [bytearray([sender, part]) for part in range(count)]
            started.append(here.sendv_async(conn, here.regv(parts)[1], parts)[1])

        threads = [threading.Thread(target=send, args=(sender,)) for sender in range(6)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
        found = [other.receive(there, 2) for _ in range(6 * count)]
        senders = [found[at][0] for at in range(0, len(found), count)]
        assert sorted(senders) == list(range(6)) and found == [bytes([sender, part]) for sender in senders for part in range(count)]
        assert all(here.wait(number, LIMIT) for number in started)


# ---- descriptors ----


@case
def descriptors_and_transfer():
    with pair() as (here, other, conn):
        theirs = here.deserialize_descs(other.describe(SIZE, 100))
        buffers = [bytearray(pattern(1, SIZE)), bytearray(pattern(2, 100))]
        mine = here.register_memory(buffers)
        assert [(one.size, len(one.lkeys), len(one.rkeys)) for one in mine] == [(SIZE, 16, 16), (100, 16, 16)]
        assert mine[0].addr == p2p.memory_of(buffers[0]).addr and "addr=" in repr(mine[0])
        ok, number = here.transfer(conn, "write", mine, theirs)
        assert ok and here.wait(number, LIMIT) and [other.content(0), other.content(1)] == buffers
        # A part of a descriptor, made anew from its fields as a program would that sends them by itself.
        part = p2p.XferDesc()
        part.addr, part.size, part.rkeys = theirs[0].addr + 10, 5, list(theirs[0].rkeys)
        local = p2p.XferDesc()
        local.addr, local.size, local.mr_id = mine[1].addr, 5, mine[1].mr_id
        number = here.transfer(conn, "read", [local], [part])[1]
        assert here.wait(number, LIMIT) and buffers[1][:5] == buffers[0][10:15]
        raises(RuntimeError, "same size", here.transfer, conn, "write", mine, theirs[:1])
        raises(RuntimeError, "Invalid op_name: move", here.transfer, conn, "move", mine, theirs)
        raises(RuntimeError, "Invalid conn_id", here.transfer, 77, "write", mine, theirs)
        raises(RuntimeError, "100 bytes with a remote one of 5", here.transfer, conn, "write", [mine[1]], [part])
        raises(RuntimeError, "not registered here", here.transfer, conn, "write", [theirs[1]], [theirs[1]])
        raises(RuntimeError, "rkeys", here.transfer, conn, "write", [local], [p2p.XferDesc()])
        here.deregister_memory(mine + theirs)
        raises(RuntimeError, "", here.transfer, conn, "read", mine, theirs)


@case
def serialized_descriptors_are_checked():
    with p2p.Endpoint() as here:
        described = here.register_memory([bytearray(10), bytearray(20)])
        data = here.get_serialized_descs(described)
        assert [(one.addr, one.size, one.rkeys) for one in here.deserialize_descs(data)] == [(one.addr, one.size, one.rkeys) for one in described]
        assert here.deserialize_descs(b"") == [] == here.deserialize_descs(here.get_serialized_descs([]))
        for end in range(1, len(data)):
            raises(RuntimeError, "Invalid serialized", here.deserialize_descs, data[:end])
        for at in range(0, len(data) - 8, 8):
            try:
                here.deserialize_descs(data[:at] + b"\xff" * 8 + data[at + 8 :])
            except RuntimeError as e:
                assert "Invalid serialized" in str(e)


# ---- notifications ----


@case
def notifications():
    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        sent = [(b"", b""), (b"name", b"message"), (b"\0a\0", bytes(range(256))), (b"n" * 1000, pattern(1, SIZE))]
        for each in sent:
            assert other.call("send_notif", there, *each) is True
        found = []
        await_that(lambda: found.extend(here.get_notifs()) or len(found) >= 4)
        assert found == sent and here.get_notifs() == []
        other.call("send_notif", there, "text", "more")
        assert here.wait_notif(LIMIT) == (b"text", b"more") and here.wait_notif.__doc__
        raises(TimeoutError, "wait_notif", here.wait_notif, 0.02)
        raises(InvalidArgument, "", here.send_notif, conn, b"", bytes((64 << 20) + 1))


# ---- peers that end ----


@case
def a_killed_peer_is_an_error():
    peer = Peer()
    peer.renew()
    with p2p.Endpoint() as here:
        conn = here.add_remote_endpoint(peer.metadata())[1]
        item, _ = peer.offer(SIZE)
        buffer = bytearray(SIZE)
        region = here.reg(buffer)[1]
        waiting = here.recv_async(conn, region, buffer)[1]

        async def wait():
            await here.aio.wait(waiting)

        threading.Timer(0.1, peer.kill).start()
        error = raises(ConnectionLost, "", asyncio.run, wait())
        assert isinstance(error, ConnectionError) and error.status == -12, error
        raises(ConnectionLost, "", here.wait, waiting)
        raises(ConnectionLost, "", here.write, conn, region, buffer, None, item)
        raises(ConnectionLost, "", here.send_notif, conn, b"name")
        assert not here.is_connected(conn) and here.dereg(region)


@case
def close_wakes_blocked_threads():
    with pair() as (here, _, conn):
        region = here.reg(bytearray(10))[1]
        address = here._core.region(region).addr
        calls = [(here.accept, ()), (here.wait_notif, ()), (here.recv, (conn, region, address, 10))]
        errors = []

        def run(call, arguments):
            errors.append(raises(UcclError, "", call, *arguments))

        threads = [threading.Thread(target=run, args=each, daemon=True) for each in calls]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        here.close()
        for thread in threads:
            thread.join(LIMIT)
        assert len(errors) == 3, errors


# ---- threads, signals, forks ----


@case
def threads_share_an_endpoint():
    with pair() as (here, other, conn):
        items = [other.offer(10000)[0] for _ in range(6)]
        errors = []

        def run(number):
            try:
                for turn in range(30):
                    buffer = bytearray(pattern(number + turn, 10000))
                    region = here.reg(buffer)[1]
                    assert here.write(conn, region, buffer, None, items[number])
                    buffer[:] = bytes(10000)
                    assert here.read(conn, region, buffer, None, items[number]) and buffer == pattern(number + turn, 10000)
                    assert here.dereg(region)
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and not here._core._regions, errors


@case
def a_blocked_call_lets_other_threads_run():
    with p2p.Endpoint() as here:
        turns = 0
        thread = threading.Thread(target=lambda: raises(TimedOut, "", here.accept, 0.3))
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            turns += 1
        assert turns > 10, turns


@case
def control_c_ends_a_blocked_call():
    program = "from uccl_tcpx import p2p\nep = p2p.Endpoint()\nprint('ready', flush=True)\nep.accept()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert "KeyboardInterrupt" in errors and process.returncode != 0, errors


@case
def a_fork_leaves_the_parents_endpoint_alone():
    if os.environ.get("UCCL_TEST_EMULATED"):
        raise Skip("qemu-user fails in threads of a forked child")
    with pair() as (here, other, conn):
        item, _ = other.offer(SIZE)
        buffer = bytearray(pattern(1, SIZE))
        region = here.reg(buffer)[1]
        metadata = other.metadata()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                for call, arguments in ((here.get_metadata, ()), (here.reg, (buffer,)), (here.accept, (0,)), (here.get_notifs, ()),
                                        (here.dereg, (region,)), (here.wait, (conn << 40 | 1,)), (here.fileno, ())):
                    assert "parent" in str(raises(UcclError, "", call, *arguments)), call
                here.close()
                with p2p.Endpoint() as own:
                    own_region = own.reg(buffer)[1]
                    assert own.write(own.add_remote_endpoint(metadata)[1], own_region, buffer, None, item)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert other.content() == pattern(1, SIZE)
        buffer[:] = bytes(SIZE)
        assert here.read(conn, region, buffer, None, item) and buffer == pattern(1, SIZE)


@case
def endpoints_that_are_lost_or_left_open_end():
    with p2p.Endpoint() as watching:
        def lose():
            lost = p2p.Endpoint()
            lost.start_passive_accept()
            conn = watching.add_remote_endpoint(lost.get_metadata())[1]
            assert watching.is_connected(conn)
            return conn

        counts = []
        for _ in range(3):
            conn = lose()
            gc.collect()
            await_that(lambda: not watching.is_connected(conn))
            assert watching.remove_remote_endpoint(conn)
            counts.append(descriptors())
        await_that(lambda: descriptors() <= counts[0])
        program = f"from uccl_tcpx import p2p\nep = p2p.Endpoint()\nep.add_remote_endpoint({watching.get_metadata()!r})\nep.reg(bytearray(10))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0 and not done.stderr, done.stderr


# ---- asyncio ----


@case
def tasks_wait_for_transfers():
    with pair() as (here, other, conn):
        items = [other.offer(SIZE)[0] for _ in range(8)]
        buffers = [bytearray(pattern(i, SIZE)) for i in range(8)]
        regions = here.regv(buffers)[1]

        async def write(number):
            for _ in range(5):
                await here.aio.wait(here.write_async(conn, regions[number], buffers[number], None, items[number])[1])

        async def run():
            await asyncio.gather(*(write(number) for number in range(8)))
            beside = asyncio.ensure_future(here.aio.wait_notif())
            raises_later = here.recv_async(conn, regions[0], buffers[0])[1]
            try:
                await asyncio.wait_for(here.aio.wait(raises_later), 0.05)
                raise AssertionError("nothing was sent")
            except asyncio.TimeoutError:
                pass
            there = await asyncio.get_running_loop().run_in_executor(None, lambda: other.call("accept", LIMIT)[3])
            other.send(there, b"late")
            await here.aio.wait(raises_later)
            assert buffers[0][:4] == b"late"
            other.call("send_notif", there, b"one", b"1")
            other.call("send_notif", there, b"two", b"2")
            assert await asyncio.wait_for(beside, LIMIT) == (b"one", b"1")
            async for name, message in here.aio.notifs():
                assert (name, message) == (b"two", b"2")
                break
            assert not here._core.events._waiting

        asyncio.run(run())
        assert [other.content(i) for i in range(1, 8)] == [pattern(i, SIZE) for i in range(1, 8)]


@case
def tasks_wait_for_connections():
    with pair(connected=False) as (here, other, _):
        async def run():
            accepting = asyncio.ensure_future(here.aio.accept())
            await asyncio.sleep(0.02)
            other.begin("call", "add_remote_endpoint", here.get_metadata())
            ok, address, gpu, number = await asyncio.wait_for(accepting, LIMIT)
            assert ok and address == "127.0.0.1" and here.is_connected(number)
            other.end()
            ok, number = await here.aio.connect(*parsed(other))
            assert ok and here.is_connected(number)

        asyncio.run(run())


@case
def loops_of_two_threads_and_a_close():
    before = descriptors()
    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        found, errors = [], []

        async def take():
            try:
                while True:
                    found.append(await here.aio.wait_notif())
            except UcclError as e:
                errors.append(e)

        threads = [threading.Thread(target=asyncio.run, args=(take(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(100):
            other.call("send_notif", there, bytes([number]), b"")
        await_that(lambda: len(found) == 100)
        here.close()
        for thread in threads:
            thread.join(LIMIT)
        assert {notification.name for notification in found} == {bytes([number]) for number in range(100)} and len(errors) == 2
    assert descriptors() <= before + 2, "descriptors of loops are closed"


@case
def a_waiting_task_does_not_spin():
    with pair() as (here, _, conn):
        looks = 0

        def look():
            nonlocal looks
            looks += 1

        async def run():
            try:
                await asyncio.wait_for(here._core.events.until(look), 0.2)
            except asyncio.TimeoutError:
                pass

        asyncio.run(run())
        assert looks < 20, looks


@case
def the_descriptor_serves_other_event_loops():
    import select

    with pair() as (here, other, conn):
        there = other.call("accept", LIMIT)[3]
        fd = here.fileno()
        os.read(fd, 8)
        assert here.get_notifs() == []
        other.call("send_notif", there, b"name", b"")
        assert select.select([fd], [], [], LIMIT)[0] == [fd] and here.wait_notif(LIMIT).name == b"name"
        os.close(fd)


# ---- the package ----


@case
def the_sources_are_python_3_9():
    for path in glob.glob(os.path.join(os.path.dirname(uccl_tcpx.__file__), "*.py")):
        text = pathlib.Path(path).read_text()
        ast.parse(text, path, feature_version=(3, 9))
        assert "from __future__ import annotations" in text or "def " not in text or path.endswith("__init__.py"), path


@case
def everything_public_is_documented_and_typed():
    for name, member in vars(p2p.Endpoint).items():
        if name.startswith("_") or isinstance(member, property):
            continue
        function = inspect.unwrap(getattr(p2p.Endpoint, name))
        signature = inspect.signature(function)
        assert function.__doc__, f"{name} has no docstring"
        assert signature.return_annotation is not signature.empty, f"{name} has no type of its result"
        missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not missing, f"{name}: no types of {missing}"
    assert (pathlib.Path(uccl_tcpx.__file__).parent / "py.typed").exists()


if __name__ == "__main__":
    sys.exit(main())
