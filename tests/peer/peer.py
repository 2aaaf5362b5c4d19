"""A peer of libuccl_p2p in Python, written from docs/protocol.md: a connector or a listener that reads, writes, and sends messages and
notifications over the software plugin's channels. This file has the section "Frames"; session.py and channels.py have the others. The
peer does one thing at a time: it reads a frame with the chunks that the frame announces, and blocks meanwhile. host.py has what
processes of one host do, as far as this peer takes part.
"""

import hmac
import os
import select
import socket
import struct
import time
from collections import deque
from copy import copy

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from channels import join_channels, move_control, set_up_channels
from host import Host, address_of
from session import (
    ERR_REMOTE_ACCESS,
    ERR_REMOTE_DISCONNECT,
    ERR_TIMED_OUT,
    ERR_TRUNCATED,
    OK,
    SECONDS,
    Failed,
    Hello,
    Reader,
    accept_handshake,
    connect_handshake,
    instance_of,
    need,
    public_of,
)

FRAME = 0xC7
(F_WRITE, F_WRITE_DATA, F_READ, F_READ_DATA, F_CHUNKS, F_DONE, F_MESSAGE, F_PULL, F_NOTIFY, F_PING, F_BYE) = range(1, 12)
F_WITHDRAW, F_CANCEL, F_ARRIVED, F_LOST, F_UP = range(12, 17)
READ, WRITE = 1, 2  # access of a region
HOST = 0  # place
NOT_DIRECT = 0xFFFFFFFF
CHUNKS_IN_A_FRAME, SEGMENTS_IN_A_CHUNK, REPORTED_AFTER = 4096, 4096, 16_384


def tag_of(transfer, sender_is_initiator, offset):
    whole = (1 << 64) - 1
    x1 = ((2 * transfer + sender_is_initiator) * 0x9E3779B97F4A7C15 & whole) ^ offset
    return ((x1 ^ x1 >> 31) * 0xBF58476D1CE4E5B9 & whole) >> 33


class Item:
    """A FIFO item: memory of a region."""

    LAYOUT, VERSION, HOST_MEMORY = "<QIIIIQ16s16s", 0x7C01, 1

    def __init__(self, data):
        self.address, self.size, self.memory, _, self.version, self.region, self.token, self.instance = struct.unpack(self.LAYOUT, data)


class Region:
    """Memory of this peer, under an address that only names it, or its own if the library is to copy it directly."""

    def __init__(self, number, memory, access, instance, direct):
        self.id, self.memory, self.access, self.instance = number, memory, access, instance
        self.address, self.token = address_of(memory) if direct else number << 32, os.urandom(16)

    def item(self, offset=0):
        size = len(self.memory) - offset
        fields = (self.address + offset, size, Item.HOST_MEMORY, 0, Item.VERSION, self.id, self.token, self.instance)
        return struct.pack(Item.LAYOUT, *fields)


class Stream:
    """Data that comes in for a transfer. `finish` gets the bytes once all are here; None: they are dropped. `announced` and `left`: bytes
    announced so far, and bytes not in place; `holes`: lengths by offset.
    """

    def __init__(self, size, finish):
        self.size, self.finish, self.data, self.announced, self.left, self.holes = size, finish, bytearray(size), 0, size, {}

    def announce(self, offset, length):
        """The next bytes, or a part of a hole."""
        if offset == self.announced:
            need(length <= self.size - offset, "more bytes than the transfer has")
            self.announced += length
            return
        start = max((start for start in self.holes if start <= offset), default=None)
        need(start is not None and offset + length <= start + self.holes[start], f"a chunk at {offset}, where no hole is")
        end = start + self.holes.pop(start)
        self.holes.update({at: length for at, length in ((start, offset - start), (offset + length, end - offset - length)) if length})


class Lane:
    """The chunks of one channel. `sent`: those announced that are not known to be in place, from number `first` on. `placed`: how many
    of the library are in place; `reported`: what it knows of that. `missing`: chunks of the library that came after this peer had closed
    the channel. `closed`: it has; `said`: and has sent Lost. `lost`: the count of the library's Lost.
    """

    def __init__(self, up):
        self.sent, self.first, self.placed, self.reported, self.missing = deque(), 0, 0, 0, []
        self.closed, self.said, self.lost = not up, not up, None if up else 0

    def arrived(self, count):
        need(self.first <= count <= self.first + len(self.sent), f"{count} chunks have arrived")
        while self.first < count:
            self.sent.popleft()
            self.first += 1


class Connection:
    """Frames both ways. `results` has (status, text or bytes) of this peer's transfers that ended, by id; `received` the messages that met
    receives, None for those that failed. `drop`: the channel of the chunk after so many sent or received ones is reset. `silent`: the
    library must notice that. `resent`: chunks announced again, by this peer and by the library. `host`: both processes, if they have met.
    """

    def __init__(self, peer, session, records, agreed, channels, host=None):
        self.peer, self.session, self.records, self.agreed, self.channels, self.host = peer, session, records, agreed, channels, host
        self.last_id, self.results, self.sending = 0, {}, {}
        self.mine, self.theirs = {}, {}  # streams that come in, by id: of this peer's transfers, and of the library's
        self.messages, self.receives, self.received, self.notifications = deque(), deque(), [], []
        self.arrived, self.pings, self.next_channel, self.bye = 0, 0, 0, None
        self.lanes, self.cancelled, self.cancels = [Lane(channel is not None) for channel in channels], set(), []
        self.drop, self.silent, self.resent, self.ups = None, False, [0, 0], {}
        self.said = time.monotonic()
        if host:
            host.waiting = self.stay_alive
        for sock in (records.sock, *(channel.out.sock for channel in channels if channel)):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.handlers = {
            F_WRITE: self.on_write,
            F_WRITE_DATA: self.on_write_data,
            F_READ: self.on_read,
            F_READ_DATA: self.on_read_data,
            F_CHUNKS: self.on_chunks,
            F_DONE: self.on_done,
            F_MESSAGE: self.on_message,
            F_PULL: self.on_pull,
            F_NOTIFY: self.on_notify,
            F_PING: self.on_ping,
            F_BYE: self.on_bye,
            F_WITHDRAW: self.on_withdraw,
            F_CANCEL: self.on_cancel,
            F_ARRIVED: self.on_arrived,
            F_LOST: self.on_lost,
            F_UP: self.on_up,
        }

    def send(self, kind, *parts):
        self.records.send_message(kind, FRAME, b"".join(parts))
        self.said = time.monotonic()

    # What this peer starts.

    def new_id(self):
        self.last_id += 1
        return self.last_id

    def request(self, kind, segments, data=b""):
        """Write or Read of segments (item, offset in it, length); its id."""
        number, regions = self.new_id(), list(dict.fromkeys((item.region, item.token) for item, _, _ in segments))
        parts = [struct.pack("<QII", number, len(regions), len(segments))]
        parts += [struct.pack("<Q16s", *region) for region in regions]
        index = {region: i for i, region in enumerate(regions)}
        for item, offset, length in segments:
            parts.append(struct.pack("<QIHBB", item.address + offset, length, index[item.region, item.token], HOST, HOST))
        self.send(kind, *parts, data)
        return number

    def write(self, segments, data):
        number = self.request(F_WRITE, segments)
        self.send_chunks(number, True, data, [length for _, _, length in segments])
        return number

    def write_with_data(self, segments, data):
        return self.request(F_WRITE_DATA, segments, data)

    def read(self, segments):
        number = self.request(F_READ, segments)
        size = sum(length for _, _, length in segments)
        self.mine[number] = Stream(size, lambda data: self.results.update({number: (OK, data)}))
        return number

    def send_message(self, data):
        number = self.new_id()
        self.sending[number] = data
        self.send(F_MESSAGE, struct.pack("<QQI", number, len(data), HOST if self.host else NOT_DIRECT))
        return number

    def withdraw(self, number, status):
        self.sending[number] = None  # the Pull that still comes asks for nothing
        self.send(F_WITHDRAW, struct.pack("<Qi", number, status))

    def cancel(self, number):
        self.cancelled.add(number)
        self.send(F_CANCEL, struct.pack("<Q", number))

    def receive_message(self, most):
        self.receives.append(most)
        self.match()

    def notify(self, name, message):
        self.send(F_NOTIFY, struct.pack("<I", len(name)), name, message)

    def ping(self):
        self.report()
        self.send(F_PING, struct.pack("<Q", self.arrived))

    def report(self):
        """Tells the library how many of its chunks are in place."""
        for channel, lane in enumerate(self.lanes):
            if lane.placed != lane.reported and not lane.said:
                lane.reported = lane.placed
                self.send(F_ARRIVED, struct.pack("<QI", lane.placed, channel))

    def close(self, status=OK, text=b""):
        self.send(F_BYE, struct.pack("<i", status), text)
        self.end()

    def end(self):
        for channel in filter(None, self.channels):
            channel.close()
        if self.host:
            self.host.close()
        self.records.sock.close()

    def close_channel(self, channel):
        self.lanes[channel].closed = True
        self.channels[channel].reset()

    def lose(self, channel, count=None):
        """Closes a channel, and says so. `count`: a lie about the chunks in place."""
        lane = self.lanes[channel]
        self.close_channel(channel)
        lane.said = True
        self.send(F_LOST, struct.pack("<QI", lane.placed if count is None else count, channel), b"closed by the test")

    def countdown(self, channel):
        """A chunk was sent or received. The channel is reset if it was the last one before the drop."""
        if self.drop is None:
            return
        self.drop -= 1
        if self.drop == 0:
            self.drop = None
            if self.silent:
                self.close_channel(channel)
            else:
                self.lose(channel)

    def failed(self, channel):
        """The library has closed a channel before it said so."""
        if not self.lanes[channel].closed:
            self.lose(channel)

    def recover(self, channel):
        """Both engines have closed a channel."""
        lane = self.lanes[channel]
        lane.arrived(lane.lost)
        for stream, offset, length in lane.missing:
            stream.holes[offset] = length
        lost, lane.sent, lane.missing = lane.sent, deque(), []
        # In another order, and cut in another way.
        for number, initiator, offset, data in reversed(lost):
            status = self.results.get(number, (OK, ""))[0] if initiator else OK
            if status != OK:
                if number not in self.cancelled:
                    self.cancel(number)
                continue
            cut = len(data) // 3
            for at, part in ((offset + cut, data[cut:]), (offset, data[:cut])):
                if part:
                    self.resent[0] += 1
                    self.announce(number, initiator, at, [part])

    def cuts(self, segments):
        """Lengths of the chunks of a stream over segments of these lengths."""
        length, crossed = 0, 0
        for left in segments:
            crossed += 1
            while length + left >= self.agreed.chunk:
                yield self.agreed.chunk
                left -= self.agreed.chunk - length
                length, crossed = 0, int(left > 0)
            length += left
            if crossed == SEGMENTS_IN_A_CHUNK:
                yield length
                length, crossed = 0, 0
        if length:
            yield length

    def send_chunks(self, number, initiator, data, segments, most=None):
        """Announces a stream, or its first `most` chunks, and sends them on the channels in turn."""
        lengths, at = list(self.cuts(segments))[:most], 0
        for first in range(0, len(lengths), CHUNKS_IN_A_FRAME):
            start, chunks = at, []
            for length in lengths[first : first + CHUNKS_IN_A_FRAME]:
                chunks.append(data[at : at + length])
                at += length
            self.announce(number, initiator, start, chunks)

    def announce(self, number, initiator, offset, chunks):
        """Announces chunks one behind the other, and sends them."""
        batch = [(chunk, self.pick()) for chunk in chunks]
        parts = [struct.pack("<IHH", len(chunk), channel, 0) for chunk, channel in batch]
        self.send(F_CHUNKS, struct.pack("<QIIQ", number, initiator, len(batch), offset), *parts)
        for chunk, channel in batch:
            self.lanes[channel].sent.append((number, initiator, offset, chunk))
            if not self.lanes[channel].closed:
                try:
                    self.channels[channel].out.send(chunk, tag_of(number, initiator, offset))
                    self.countdown(channel)
                except OSError:
                    self.failed(channel)
            offset += len(chunk)

    def pick(self):
        """The next channel that is not lost."""
        for _ in self.channels:
            channel, self.next_channel = self.next_channel, (self.next_channel + 1) % len(self.channels)
            if not self.lanes[channel].closed:
                return channel
        raise Failed(ERR_REMOTE_DISCONNECT, "no channel is left")

    # What the library sends.

    def step(self, seconds):
        """Handles one frame, if one comes in that time, and what the library's process says and orders."""
        if self.host:
            self.host.step()
        if not self.records.plain and not select.select([self.records.sock], [], [], seconds)[0]:
            return
        kind, payload = self.records.read_message(FRAME)
        need(kind in self.handlers, f"a frame of the unknown type {kind}")
        fields = Reader(payload)
        self.handlers[kind](fields)
        fields.end()

    def until(self, done):
        """Handles frames until the condition holds."""
        end = time.monotonic() + SECONDS
        while not done():
            if self.bye:
                raise Failed(*self.bye)
            if time.monotonic() > end:
                raise Failed(ERR_TIMED_OUT, "waited too long")
            self.stay_alive()
            self.step(0.001)

    def stay_alive(self):
        if time.monotonic() - self.said > self.agreed.timeout_ms / 3000:
            self.ping()

    def result(self, number):
        self.until(lambda: number in self.results)
        return self.results.pop(number)

    def views(self, regions, segments, access):
        """The memory of the segments; None if some of it may not be accessed."""
        found = []
        for number, token in regions:
            region = self.peer.regions.get(number)
            if not region or not hmac.compare_digest(token, region.token) or not region.access & access:
                return None
            found.append(region)
        views = []
        for address, length, index, _, place in segments:
            start = address - found[index].address
            if start < 0 or start + length > len(found[index].memory) or place != HOST:
                return None
            views.append(memoryview(found[index].memory)[start : start + length])
        return views

    def request_of(self, fields, access):
        """(id, memory or None, bytes) of a Write or a Read."""
        number, n, m = fields.unpack("QII")
        regions = [fields.unpack("Q16s") for _ in range(n)]
        segments = [fields.unpack("QIHBB") for _ in range(m)]
        need(m and all(1 <= length <= 1 << 30 and index < n for _, length, index, _, _ in segments), "a segment")
        return number, self.views(regions, segments, access), sum(length for _, length, _, _, _ in segments)

    def done(self, number, status, text=b""):
        self.send(F_DONE, struct.pack("<Qi", number, status), text)

    def refuse_access(self, number):
        self.done(number, ERR_REMOTE_ACCESS, b"the region does not exist, or does not give this access")

    def store(self, number, views, data):
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)
        self.done(number, OK)

    def on_write(self, fields):
        number, views, size = self.request_of(fields, WRITE)
        self.theirs[number] = Stream(size, views and (lambda data: self.store(number, views, data)))
        if not views:
            self.refuse_access(number)

    def on_write_data(self, fields):
        number, views, size = self.request_of(fields, WRITE)
        data = fields.bytes(size)
        if views:
            self.store(number, views, data)
        else:
            self.refuse_access(number)

    def on_read(self, fields):
        number, views, size = self.request_of(fields, READ)
        if not views:
            self.refuse_access(number)
        elif size <= self.peer.eager_bytes:
            self.send(F_READ_DATA, struct.pack("<Q", number), *views)
        else:
            self.send_chunks(number, False, b"".join(views), [len(view) for view in views])

    def on_read_data(self, fields):
        stream = self.mine.pop(fields.unpack("Q"))
        data = fields.rest()
        need(len(data) == stream.size, "Read's data of a wrong length")
        stream.finish(data)

    def on_chunks(self, fields):
        number, initiator, n, offset = fields.unpack("QIIQ")
        streams = self.theirs if initiator else self.mine
        for _ in range(n):
            length, channel, _ = fields.unpack("IHH")
            need(number in streams, f"a chunk of transfer {number}, which expects none")
            need(self.lanes[channel].lost is None, f"a chunk on channel {channel}, which the library has closed")
            stream = streams[number]
            need(1 <= length <= self.agreed.chunk, "the length of a chunk")
            self.resent[1] += offset < stream.announced
            stream.announce(offset, length)
            data = self.take(channel, length, tag_of(number, initiator, offset))
            if data is None:
                self.lanes[channel].missing.append((stream, offset, length))
            else:
                stream.data[offset : offset + length] = data
                stream.left -= length
            offset += length
            if stream.left == 0:
                del streams[number]
                if stream.finish:
                    stream.finish(bytes(stream.data))
                if not initiator:
                    self.report()  # the library keeps the memory in use until then
        if sum(lane.placed - lane.reported for lane in self.lanes) >= REPORTED_AFTER:
            self.report()

    def take(self, channel, length, tag):
        """The bytes of a chunk; None where the channel is lost."""
        lane = self.lanes[channel]
        if lane.closed:
            return None
        try:
            data = self.channels[channel].into.receive(length, tag)
        except (Failed, OSError) as error:
            if isinstance(error, Failed) and error.status != ERR_REMOTE_DISCONNECT:
                raise
            self.failed(channel)
            return None
        lane.placed += 1
        self.arrived += length
        self.countdown(channel)
        return data

    def on_done(self, fields):
        number, status = fields.unpack("Qi")
        self.mine.pop(number, None)
        self.results[number] = (status, fields.rest().decode())

    def on_message(self, fields):
        number, size, place = fields.unpack("QQI")
        self.messages.append((number, size, place))
        self.match()

    def match(self):
        """Messages and receives match in order."""
        while self.messages and self.receives:
            (number, size, place), most = self.messages.popleft(), self.receives.popleft()
            if size > most:
                self.received.append(None)
                self.pull(number, ERR_TRUNCATED)
                continue
            if size and self.host and place == HOST:
                memory = bytearray(size)
                slot, generation = self.host.give(address_of(memory), size, WRITE, lambda memory=memory: self.received.append(bytes(memory)))
                self.pull(number, OK, struct.pack("<IQQ", slot, generation, address_of(memory)))
                continue
            if size:
                self.theirs[number] = Stream(size, lambda data, number=number: (self.received.append(data), self.done(number, OK)))
            else:
                self.received.append(b"")  # the Pull ends it
            self.pull(number, OK)

    def pull(self, number, status, landing=b""):
        self.send(F_PULL, struct.pack("<QiI", number, status, HOST), landing)

    def on_pull(self, fields):
        number, status, _ = fields.unpack("QiI")
        data = self.sending.pop(number)
        if fields.at < len(fields.data):
            slot, generation, address = fields.unpack("IQQ")
            memory = bytearray(data)
            order = self.host.order(slot, generation, [(address_of(memory), address, len(memory))], memory)
            self.results[number] = (OK if self.host.outcome(order) else ERR_REMOTE_ACCESS, "")
        elif status == OK and data:
            self.send_chunks(number, True, data, [len(data)])
        else:
            self.results[number] = (status, "")

    def on_notify(self, fields):
        name = fields.bytes(fields.unpack("I"))
        self.notifications.append((name, fields.rest()))

    def on_ping(self, fields):
        fields.unpack("Q")
        self.pings += 1

    def on_bye(self, fields):
        self.bye = (fields.unpack("i"), fields.rest().decode())

    def on_withdraw(self, fields):
        number, status = fields.unpack("Qi")
        need(status != OK, "a Withdraw without a status")
        for message in [message for message in self.messages if message[0] == number]:
            self.messages.remove(message)
            self.pull(number, status)
        if self.theirs.pop(number, None):
            self.received.append(None)

    def on_cancel(self, fields):
        number = fields.unpack("Q")
        stream = self.theirs.pop(number)
        need(not stream.finish, "a Cancel of a write that was not refused")
        need(stream.announced < stream.size or stream.holes, "a Cancel of a write of which nothing is left")
        self.cancels.append(number)

    def lane(self, channel):
        need(channel < len(self.lanes) and self.lanes[channel].lost is None, f"channel {channel}, which the library has closed")
        return self.lanes[channel]

    def on_arrived(self, fields):
        chunks, channel = fields.unpack("QI")
        self.lane(channel).arrived(chunks)

    def on_lost(self, fields):
        chunks, channel = fields.unpack("QI")
        fields.rest().decode()
        lane = self.lane(channel)
        lane.lost = chunks
        if not lane.said:
            self.lose(channel)
        self.recover(channel)

    def on_up(self, fields):
        generation, channel = fields.unpack("II")
        need(self.ups.pop(channel, None) == generation, "Up for a channel that was not set up")
        self.lanes[channel] = Lane(True)

    def join(self, address, generation, numbers):
        """Sets up lost channels of the first set again; the library says Up for each."""
        with socket.create_connection(address, SECONDS) as sock:
            session, records, agreed = self.peer.handshake(sock, joins=1)
            nics = [self.peer.nics[number] if self.peer.nics else b"lo" for number in numbers]
            up = join_channels(self.session, session, records, agreed, nics, generation, numbers)
        for number, channel in up.items():
            self.channels[number], self.ups[number] = channel, generation
            self.send(F_UP, struct.pack("<II", generation, number))
        self.until(lambda: not self.ups)

    def move(self, address, generation, opened=None):
        """The control connection goes on over another socket. `opened`: how many records this peer claims to have opened."""
        sock = socket.create_connection(address, SECONDS)
        session, records, _ = self.peer.handshake(sock, joins=1)
        known = move_control(self.session, session, records, generation, self.records.into.number if opened is None else opened)
        self.records.move(sock, known)


class Peer:
    """What an engine is to the protocol: a static key, the keys of a key file, a hello, regions. `nics`: a channel is offered on each;
    `up`: the numbers of the channels that it brings up; `direct`: it meets the library's process."""

    def __init__(self, keys=(), eager_bytes=8192, nics=None, up=lambda number: True, direct=False, **hello):
        self.static, self.keys, self.hello, self.eager_bytes = X25519PrivateKey.generate(), list(keys), Hello(**hello), eager_bytes
        self.nics, self.up, self.direct, self.regions = nics, up, direct, {}
        self.instance = instance_of(public_of(self.static))

    def register(self, memory, access=READ | WRITE):
        region = Region(len(self.regions) + 1, memory, access, self.instance, self.direct)
        self.regions[region.id] = region
        return region

    def connect(self, address):
        sock = socket.create_connection(address, SECONDS)
        try:
            return self.set_up(*self.handshake(sock))
        except Exception:
            sock.close()
            raise

    def handshake(self, sock, joins=0):
        hello = copy(self.hello)
        hello.joins = joins
        return connect_handshake(sock, self.static, self.keys[0] if self.keys else None, hello)

    def accept(self, listener):
        listener.settimeout(SECONDS)
        sock = listener.accept()[0]
        sock.settimeout(SECONDS)
        try:
            return self.set_up(*accept_handshake(sock, self.static, self.keys, self.hello))
        except Exception:
            sock.close()
            raise

    def set_up(self, session, records, agreed):
        nics = self.nics or [b"lo"] * agreed.channels
        host = Host(session, self.regions) if self.direct else None
        return Connection(self, session, records, agreed, set_up_channels(session, records, agreed, nics, self.up, host), host)
