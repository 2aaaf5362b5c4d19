"""The section "Processes on one host" of docs/protocol.md, for host memory that is copied directly. Knows the frames of messages alone
by what it is asked for. What it leaves out: GPU memory, staged pairs, and sleeping, since it looks at its words all the time.
"""

import ctypes as c
import fcntl
import hmac
import mmap
import os
import socket
import struct
import time
from hashlib import sha256

from session import ERR_REMOTE_ACCESS, ERR_REMOTE_DISCONNECT, ERR_TIMED_OUT, SECONDS, Failed, Reader, mac, need

LIBC = c.CDLL(None, use_errno=True)
MAGIC, VERSION, HOST, DIRECT = b"UCCL", 4, 0, 1
RING, SHARE, ANSWER, END, GRANT, REVOKE, AREA, CLAIM, REFUSE = range(1, 10)
CAN_READ, CAN_WRITE, READ_DIRECTLY, WRITE_DIRECTLY = 1, 2, 4, 8
# Words of a file.
TAIL, TAKEN_BACK, SLEEPS, HEAD, ENDED, MOVED, READ = range(0, 56, 8)
OUTCOME, PROGRESS, GRANTS, RECORDS, WORDS = 512, 1536, 2560, 10_752, 141_824
IN_RING, LAST, SKIP = WORDS - RECORDS, 1, 2


class IoVec(c.Structure):
    _fields_ = [("base", c.c_void_p), ("size", c.c_size_t)]


def address_of(memory):
    """Where the bytes of a bytearray lie."""
    return c.addressof((c.c_char * len(memory)).from_buffer(memory))


def words_of(descriptor):
    """The words of a file. ctypes reads and writes each with one access of 8 bytes, and x86 keeps the order of writes, as of reads."""
    return (c.c_uint64 * WORDS).from_buffer(mmap.mmap(descriptor, 8 * WORDS))


def host_name():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return sha256(b"uccl-p2p host " + file.read().strip().encode()).digest()[:16]


class Order:
    """An order of the library that has not ended."""

    def __init__(self):
        self.bytes, self.refused = 0, False


class Host:
    """Both processes of a connection. `own` and `theirs`: the words of both files. `grants`: by slot, (generation, address, bytes, access,
    what to call once an order of it has ended or None). `claims`: by (region, token), the library's answer to a claim: Failed or (slot,
    generation). `waiting`: called while this peer waits."""

    def __init__(self, session, regions):
        self.session, self.regions, self.name = session, regions, os.urandom(16)
        self.file = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, 8 * WORDS)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.own, self.theirs, self.witness, self.listener = words_of(self.file), None, mmap.mmap(-1, 4096), None
        self.witness.write(os.urandom(4096))
        self.waiting = lambda: None
        self.grants, self.claims, self.orders, self.sent, self.read_up_to, self.claimed = {}, {}, {}, {}, 0, []
        if not session.connector:
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.listener.bind(self.address(self.name))
            self.listener.listen()

    def address(self, name):
        return b"\0uccl-p2p-" + name.hex().encode()

    def invitation(self):
        return b"\x01" + host_name() + self.name

    # Meeting.

    def meet(self, invitation):
        """With the library's invitation, (name of the host, name of a socket)."""
        need(invitation is not None and invitation[:16] == host_name(), "the library runs on this host")
        ours, theirs = self.session.directions()
        if self.listener:
            self.listener.settimeout(SECONDS)
            self.sock = self.listener.accept()[0]
            self.listener.close()
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.sock.connect(self.address(invitation[16:]))
            self.introduce(ours)
        self.sock.settimeout(SECONDS)
        self.pid = struct.unpack("iii", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        said, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 2)
        need(hmac.compare_digest(said[-32:], mac(self.session.key(b"uccl local", theirs), said[:-32])), "the proof of the session")
        need(len(descriptors) == 1 and os.fstat(descriptors[0]).st_size == 8 * WORDS, "the library's file")
        fields = Reader(said[:-32])
        need(fields.unpack("4sH") == (MAGIC, VERSION), "the library's introduction")
        fields.bytes(17 * fields.unpack("H"))
        self.peer_witness = fields.unpack("Q32s")
        fields.end()
        self.theirs = words_of(descriptors[0])
        os.close(descriptors[0])
        if self.session.connector is False:
            self.introduce(ours)
        self.sock.send(struct.pack("<4sHHBBB", MAGIC, VERSION, 1, HOST, HOST, DIRECT))
        fields = Reader(self.sock.recv(4096))
        need(fields.unpack("4sH") == (MAGIC, VERSION), "the library's findings")
        found = [fields.unpack("BBB") for _ in range(fields.unpack("H"))]
        fields.end()
        need((HOST, HOST, DIRECT) in found, "the library reads this process")
        self.sock.setblocking(False)

    def introduce(self, direction):
        said = struct.pack("<4sHHQ", MAGIC, VERSION, 0, c.addressof(c.c_char.from_buffer(self.witness))) + self.witness[:32]
        socket.send_fds(self.sock, [said + mac(self.session.key(b"uccl local", direction), said)], [self.file])
        os.close(self.file)

    def close(self):
        """This peer's memory is its own again."""
        self.own[TAKEN_BACK] = 1
        self.sock.close()

    # What both sides do.

    def copy(self, source, target, size):
        """Memory of the library's process into this one's, and its witness in the same call."""
        seen = c.create_string_buffer(32)
        here = (IoVec * 2)(IoVec(target, size), IoVec(c.addressof(seen), 32))
        there = (IoVec * 2)(IoVec(source, size), IoVec(self.peer_witness[0], 32))
        got = LIBC.process_vm_readv(self.pid, here, c.c_ulong(2), there, c.c_ulong(2), c.c_ulong(0))
        if got != size + 32 or seen.raw != self.peer_witness[1] or self.theirs[TAKEN_BACK]:
            raise Failed(ERR_REMOTE_DISCONNECT, f"{got} bytes of {size + 32} came from the library's process")

    def wake(self):
        if self.theirs[SLEEPS] == 1:
            self.theirs[SLEEPS] = 0
            self.sock.send(struct.pack("<B", RING))

    def step(self):
        """Handles what the library has said and ordered."""
        while True:
            try:
                said = self.sock.recv(4096)
            except BlockingIOError:
                break
            if not said:
                raise Failed(ERR_REMOTE_DISCONNECT, "the library has closed its Unix socket")
            self.take(said[0], Reader(said[1:]))
        while self.read_up_to != self.theirs[TAIL]:
            self.record()
        # It may have fallen asleep after this peer looked.
        if self.own[HEAD] != self.own[TAIL]:
            self.wake()

    def take(self, kind, fields):
        if kind == CLAIM:
            self.on_claim(*fields.unpack("Q16sB"))
        elif kind == GRANT:
            slot, generation, region, _, _, token, _, _, flags = fields.unpack("IQQQQ16sBBB")
            self.claims[region, token] = (slot, generation, flags)
        elif kind == REFUSE:
            region, token, _ = fields.unpack("Q16sB")
            why = (fields.unpack("i"), fields.rest().decode("ascii")) if fields.at < len(fields.data) else (0, "channels are to carry it")
            self.claims[region, token] = Failed(*why)
        else:
            need(kind in (RING, REVOKE), f"a message of kind {kind}")
            fields.rest()
        fields.end()

    # What the library may do here.

    def give(self, address, size, access, ended=None):
        """A new grant: its slot and generation."""
        slot, generation = len(self.grants), 1
        self.grants[slot] = (generation, address, size, access, ended)
        self.own[GRANTS + 2 * slot] = 1 + 2 * generation
        return slot, generation

    def on_claim(self, number, token, place):
        self.claimed.append((number, token))
        region = self.regions.get(number)
        if not region or not hmac.compare_digest(region.token, token):
            text = b"the region does not exist, or has another token"
            self.sock.send(struct.pack("<BQ16sBi", REFUSE, number, token, place, ERR_REMOTE_ACCESS) + text)
            return
        slot, generation = self.give(region.address, len(region.memory), region.access)
        flags = region.access | READ_DIRECTLY | WRITE_DIRECTLY
        where = (region.address, len(region.memory), token, HOST, place, flags)
        self.sock.send(struct.pack("<BIQQQQ16sBBB", GRANT, slot, generation, number, *where))

    def record(self):
        """Carries out the next record of the library's ring."""
        at = self.read_up_to % IN_RING
        size, flags = self.theirs[RECORDS + at] & 0xFFFFFFFF, self.theirs[RECORDS + at] >> 32
        if flags == SKIP:
            need(size == IN_RING - at, "a way to the front of the ring")
            return self.passed(size)
        need(size > 4 and size % 3 == 1 and at + size <= IN_RING, f"a record of {size} words")
        number, generation, grant, *words = self.theirs[RECORDS + at + 1 : RECORDS + at + size]
        slot, export = grant & 0xFFFFFFFF, grant >> 32
        need(export == 0, "host memory has no exports")
        if number not in self.orders:
            self.orders[number], self.theirs[PROGRESS + number % 1024] = Order(), 0
        order = self.orders[number]
        stands, start, length, access, ended = self.grants.get(slot, (None, 0, 0, 0, None))
        order.refused |= stands != generation or self.own[GRANTS + 2 * slot] != 1 + 2 * generation or not access & CAN_WRITE
        for source, target, count in zip(*[iter(words)] * 3) if not order.refused else ():
            need(start <= target and target + count <= start + length, "a block outside of its grant")
            self.copy(source, target, count)
            order.bytes += count
            self.theirs[MOVED] += count
            self.theirs[PROGRESS + number % 1024] = order.bytes
        self.passed(size)
        if flags & LAST:
            del self.orders[number]
            if ended:
                self.own[GRANTS + 2 * slot] = 0
                ended()
            self.theirs[OUTCOME + number % 1024] = 2 * number + (not order.refused)
            self.theirs[ENDED] += 1
            self.wake()

    def passed(self, size):
        self.read_up_to += size
        self.theirs[HEAD] = self.read_up_to

    # What this peer does there.

    def until(self, done):
        end = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > end:
                raise Failed(ERR_TIMED_OUT, "waited too long for the library's process")
            self.waiting()
            self.step()

    def claim(self, item, token=None):
        """(slot, generation) of the library's grant of a region."""
        key = (item.region, token or item.token)
        if key not in self.claims:
            self.send_claim(*key)
            self.until(lambda: key in self.claims)
        if isinstance(self.claims[key], Failed):
            raise self.claims[key]
        return self.claims[key][:2]

    def send_claim(self, region, token):
        self.sock.send(struct.pack("<BQ16sB", CLAIM, region, token, HOST))

    def read(self, item, offset, size):
        (slot, generation), data = self.claim(item), bytearray(size)
        under_way = GRANTS + 2 * slot + 1
        self.theirs[under_way] += 1
        try:
            if self.theirs[under_way - 1] != 1 + 2 * generation:
                raise Failed(ERR_REMOTE_ACCESS, "the grant has ended")
            self.copy(item.address + offset, address_of(data), size)
        finally:
            self.theirs[under_way] -= 1
        self.theirs[READ] += size
        return bytes(data)

    def write(self, item, offset, data):
        """Whether the library has taken the order."""
        memory = bytearray(data)
        number = self.order(*self.claim(item), [(address_of(memory), item.address + offset, len(memory))], memory)
        return self.outcome(number)

    def outcome(self, number):
        self.until(lambda: self.own[OUTCOME + number % 1024] >> 1 == number)
        self.sent.pop(number)
        return self.own[OUTCOME + number % 1024] & 1 == 1

    def order(self, slot, generation, blocks, memory):
        """An order of one record, with the memory that it needs until it ends; its number."""
        number = max(self.sent, default=self.own[ENDED]) + 1
        size, tail = 4 + 3 * len(blocks), self.own[TAIL]
        at = tail % IN_RING
        if at + size > IN_RING:
            self.own[RECORDS + at] = IN_RING - at | SKIP << 32
            tail, at = tail + IN_RING - at, 0
        self.until(lambda: tail + size - self.own[HEAD] <= IN_RING)
        words = [size | LAST << 32, number, generation, slot] + [word for block in blocks for word in block]
        for i, word in enumerate(words):
            self.own[RECORDS + at + i] = word
        self.sent[number] = memory
        self.own[TAIL] = tail + size
        self.wake()
        return number
