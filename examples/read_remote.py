#!/usr/bin/env python3
"""The C ABI from Python, with ctypes alone: this process reads memory of another process.

usage: python3 read_remote.py [path of libuccl_p2p.so]
"""

import ctypes as c
import subprocess
import sys

SIZE = 1 << 20
FIFO_SIZE = 64


class FifoItem(c.Structure):
    _fields_ = [
        ("addr", c.c_uint64),
        ("size", c.c_uint32),
        ("rkey", c.c_uint32),
        ("nmsgs", c.c_uint32),
        ("rid", c.c_uint32),
        ("idx", c.c_uint64),
        ("padding", c.c_char * 32),
    ]


def load(path):
    lib = c.CDLL(path)
    handle, size = c.c_void_p, c.c_size_t
    prototypes = {
        "create": (handle, [c.c_int, c.c_bool]),
        "destroy": (None, [handle]),
        "reg": (c.c_int, [handle, size, size, c.POINTER(c.c_uint64)]),
        "mr_destroy": (None, [handle, c.c_uint64]),
        "metadata_into": (c.c_int, [handle, c.c_char_p, size, c.POINTER(size)]),
        "parse_metadata": (c.c_int, [c.c_char_p, c.c_char_p, size, c.POINTER(c.c_int), c.c_char_p, size]),
        "prepare_fifo": (c.c_int, [handle, c.c_uint64, handle, size, c.c_char_p]),
        "connect": (handle, [handle, c.c_char_p, c.c_char_p, c.c_int, c.c_bool]),
        "conn_destroy": (None, [handle]),
        "read": (c.c_int, [handle, c.c_uint64, handle, size, FifoItem, c.POINTER(c.c_uint64)]),
        "wait": (c.c_int, [handle, c.c_uint64, c.c_int64]),
        "last_error": (c.c_char_p, []),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(lib, "uccl_engine_" + name)
        function.restype, function.argtypes = result, arguments
    return lib


def need(lib, holds, what):
    if not holds:
        sys.exit(f"{what}: {lib.uccl_engine_last_error().decode()}")


def owner(lib):
    """Offers a region and keeps it until its standard input ends."""
    engine = lib.uccl_engine_create(0, True)
    need(lib, engine, "create")
    memory = c.create_string_buffer(bytes(i * 31 % 256 for i in range(SIZE)), SIZE)
    region = c.c_uint64()
    need(lib, lib.uccl_engine_reg(engine, c.addressof(memory), SIZE, c.byref(region)) == 0, "reg")
    item = c.create_string_buffer(FIFO_SIZE)
    need(lib, lib.uccl_engine_prepare_fifo(engine, region, c.addressof(memory), SIZE, item) == 0, "prepare_fifo")
    metadata = c.create_string_buffer(256)
    need(lib, lib.uccl_engine_metadata_into(engine, metadata, len(metadata), None) == 0, "metadata_into")
    print(metadata.value.decode(), item.raw.hex(), flush=True)
    sys.stdin.read()
    lib.uccl_engine_mr_destroy(engine, region)
    lib.uccl_engine_destroy(engine)


def reader(lib, path):
    other = subprocess.Popen([sys.executable, __file__, path, "owner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metadata, item_hex = other.stdout.readline().split()

    engine = lib.uccl_engine_create(0, True)
    need(lib, engine, "create")
    ip, gpu, port = c.create_string_buffer(64), c.create_string_buffer(512), c.c_int()
    parsed = lib.uccl_engine_parse_metadata(metadata.encode(), ip, len(ip), c.byref(port), gpu, len(gpu))
    need(lib, parsed == 0, "parse_metadata")
    conn = lib.uccl_engine_connect(engine, ip.value, gpu.value, port, False)
    need(lib, conn, "connect")

    memory, region, transfer = c.create_string_buffer(SIZE), c.c_uint64(), c.c_uint64()
    need(lib, lib.uccl_engine_reg(engine, c.addressof(memory), SIZE, c.byref(region)) == 0, "reg")
    item = FifoItem.from_buffer_copy(bytes.fromhex(item_hex))
    started = lib.uccl_engine_read(conn, region, c.addressof(memory), SIZE, item, c.byref(transfer))
    need(lib, started == 0 and lib.uccl_engine_wait(conn, transfer, -1) == 0, "read")
    need(lib, memory.raw == bytes(i * 31 % 256 for i in range(SIZE)), "comparing")

    lib.uccl_engine_conn_destroy(conn)
    lib.uccl_engine_mr_destroy(engine, region)
    lib.uccl_engine_destroy(engine)
    other.stdin.close()
    need(lib, other.wait() == 0, "the owner")
    print(f"{SIZE} bytes read from another process")


if __name__ == "__main__":
    library_path = sys.argv[1] if len(sys.argv) > 1 else "libuccl_p2p.so.0"
    library = load(library_path)
    if sys.argv[2:] == ["owner"]:
        owner(library)
    else:
        reader(library, library_path)
