"""The real library by its C ABI: what test_peer.py needs of it."""

import ctypes as c
import threading


class FifoItem(c.Structure):
    _fields_ = [
        ("addr", c.c_uint64), ("size", c.c_uint32), ("rkey", c.c_uint32), ("nmsgs", c.c_uint32), ("rid", c.c_uint32),
        ("idx", c.c_uint64), ("padding", c.c_char * 32),
    ]


class Option(c.Structure):
    _fields_ = [("name", c.c_char_p), ("value", c.c_char_p)]


class Info(c.Structure):
    _fields_ = [("status", c.c_int32), ("reserved", c.c_uint32), ("bytes_total", c.c_uint64), ("bytes_done", c.c_uint64)]


class Library:
    def __init__(self, path):
        self.dll = c.CDLL(path)
        for name in ("create", "connect", "accept"):
            getattr(self.dll, f"uccl_engine_{name}").restype = c.c_void_p
        for name in ("last_error", "notif_name", "notif_msg"):
            getattr(self.dll, f"uccl_engine_{name}").restype = c.c_void_p

    def __getattr__(self, name):
        return getattr(self.dll, "uccl_engine_" + name)

    def error(self):
        return c.string_at(self.last_error()).decode()

    def ok(self, status):
        if status != 0:
            raise RuntimeError(f"status {status}: {self.error()}")


class Engine:
    def __init__(self, library, **settings):
        self.library, self.handle, self.regions = library, c.c_void_p(), []
        options = [Option(name.encode(), str(value).encode()) for name, value in settings.items()]
        library.ok(library.create_with((Option * len(options))(*options), c.c_size_t(len(options)), c.byref(self.handle)))
        text = c.create_string_buffer(200)
        library.ok(library.metadata_into(self.handle, text, c.c_size_t(200), None))
        self.metadata = text.value.decode()

    def address(self):
        address, port = self.metadata.split("?")[0].rsplit(":", 1)
        return address.strip("[]"), int(port)

    def destroy(self):
        self.library.destroy(self.handle)
        self.regions.clear()

    def accept(self):
        address, gpu = c.create_string_buffer(64), c.c_int()
        return Conn(self, self.library.accept(self.handle, address, c.c_size_t(64), c.byref(gpu)))

    def connecting(self, port):
        """Starts a connect; the function that is returned waits for its connection."""
        found = []

        def run():
            conn = self.library.connect(self.handle, b"127.0.0.1", b"-1", port, False)
            found.append(conn or self.library.error())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def wait():
            thread.join(30)
            if isinstance(found[0], str):
                raise RuntimeError(found[0])
            return Conn(self, found[0])

        return wait

    def memory(self, data, access=3):
        """A new region. Its memory stays until the engine is destroyed, also where the caller drops it: peers may write to it."""
        self.regions.append(Memory(self, data, access))
        return self.regions[-1]

    def notification(self):
        """(name, message), or None."""
        found, size = c.c_void_p(), c.c_size_t()
        self.library.ok(self.library.notif_next(self.handle, c.byref(found)))
        if not found:
            return None
        name = c.string_at(self.library.notif_name(found, c.byref(size)), size.value)
        message = c.string_at(self.library.notif_msg(found, c.byref(size)), size.value)
        self.library.notif_free(found)
        return name, message


class Memory:
    """A registered region with these bytes at first."""

    def __init__(self, engine, data, access):
        self.engine, self.size, self.buffer, self.mr = engine, len(data), c.create_string_buffer(bytes(data), len(data)), c.c_uint64()
        address = c.c_size_t(c.addressof(self.buffer))
        engine.library.ok(engine.library.reg_with(engine.handle, address, c.c_size_t(self.size), c.c_uint32(access), c.byref(self.mr)))

    def item(self):
        item = c.create_string_buffer(64)
        self.engine.library.ok(self.engine.library.prepare_fifo(self.engine.handle, self.mr, self.buffer, c.c_size_t(self.size), item))
        return item.raw

    def bytes(self):
        return self.buffer.raw

    def at(self, offset):
        return c.addressof(self.buffer) + offset


class Conn:
    def __init__(self, engine, handle):
        self.engine, self.library, self.handle = engine, engine.library, c.c_void_p(handle)

    def start(self, call, *arguments):
        number = c.c_uint64()
        self.library.ok(getattr(self.library, call)(self.handle, *arguments, c.byref(number)))
        return number.value

    def one_sided(self, call, memory, segments):
        """read_vector or write_vector of (offset here, length, item)."""
        n = len(segments)
        items = (FifoItem * n)(*[FifoItem.from_buffer_copy(item) for _, _, item in segments])
        addresses = (c.c_void_p * n)(*[memory.at(offset) for offset, _, _ in segments])
        lengths = (c.c_size_t * n)(*[length for _, length, _ in segments])
        return self.start(call, (c.c_uint64 * n)(*[memory.mr.value] * n), addresses, lengths, items, n)

    def send(self, memory, size):
        return self.start("send", memory.mr, memory.buffer, c.c_size_t(size))

    def recv(self, memory, size):
        return self.start("recv_async", memory.mr, memory.buffer, c.c_size_t(size))

    def wait(self, number, milliseconds=20_000):
        """(status, bytes of the transfer)"""
        status, info = self.library.wait(self.handle, c.c_uint64(number), c.c_int64(milliseconds)), Info()
        self.library.poll(self.handle, c.c_uint64(number), c.byref(info))
        return status, info.bytes_total

    def notify(self, name, message):
        self.library.ok(self.library.send_notif_bytes(self.handle, name, c.c_size_t(len(name)), message, c.c_size_t(len(message))))

    def status(self):
        return self.library.conn_status(self.handle)

    def destroy(self):
        self.library.conn_destroy(self.handle)
