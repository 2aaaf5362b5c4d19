"""The sections "Set-up" and "Data channels of the software plugin" of docs/protocol.md, for one set. host.py has what
processes of one host do. Knows no frames.
"""

import hmac
import ipaddress
import socket
import struct

from session import ENCRYPT, ERR_UNSUPPORTED, INTEGRITY, OK, SECONDS, TO_CONNECTING, TO_LISTENING, Failed, Reader, Sealing, need, mac, read_exactly

# ---- Set-up ----

OFFER, READY, ABORT, SETUP = 1, 2, 3, 0xC8
NO_HANDLE = bytes(128)  # of an engine that dials


def offer(channels, invitation=b"\x00"):
    """An Offer of one set of channels, (name of the NIC, handle) each, without addresses, for a new connection."""
    parts = [bytes([len(nic)]) + nic + handle for nic, handle in channels]
    return struct.pack("<BH", 1, len(parts)) + b"".join(parts) + invitation + b"\x00\x00"


def read_offer(payload):
    """The channels of the set, and the invitation or None."""
    fields = Reader(payload)
    need(fields.unpack("B") == 1, "the software plugin has one set")
    channels = [(fields.short(), fields.bytes(128)) for _ in range(fields.unpack("H"))]
    need(all(1 <= len(nic) <= 31 for nic, _ in channels), "the name of a NIC")
    invitation = fields.bytes(32) if fields.unpack("B") == 1 else None
    addresses = fields.unpack("B")
    need(addresses <= 8, "addresses of a listener")
    fields.bytes(18 * addresses)
    need(fields.unpack("B") == 0, "an Offer that joins a connection")
    fields.end()
    return channels, invitation


def join(ours, theirs):
    """The channels of two Offers, given as names of NICs: (place in ours, place in theirs), in the order of their numbers."""

    def ranked(names):
        return {(names[:i].count(name), name): i for i, name in enumerate(names)}

    own, other = ranked(ours), ranked(theirs)
    joined = [(own[key], other[key]) for key in sorted(own.keys() & other.keys())]
    rest = [[i for i in range(len(names)) if i not in taken] for names, taken in zip((ours, theirs), list(zip(*joined)) or [(), ()])]
    return joined + list(zip(*rest))


def ready(channels, met=False):
    return struct.pack("<iHH", OK, 0, len(channels)) + struct.pack(f"<{len(channels)}H", *channels) + bytes([met])


def read_ready(payload, met=False):
    """The numbers of the channels that are up."""
    fields = Reader(payload)
    status, size = fields.unpack("iH")
    text = fields.bytes(size).decode("ascii")
    channels = [fields.unpack("H") for _ in range(fields.unpack("H"))]
    need(fields.unpack("B") == met, "whether the library has met this process on the host")
    fields.end()
    if status != OK:
        raise Failed(status, text)
    return channels


def expect_setup(records, kind):
    found, payload = records.read_message(SETUP)
    if found == ABORT:
        fields = Reader(payload)
        raise Failed(fields.unpack("i"), fields.bytes(fields.unpack("H")).decode("ascii"))
    need(found == kind, "a message of the set-up out of order")
    return payload


def set_up_channels(session, records, agreed, nics, up, host=None):
    """Offers a channel on each of `nics`, and brings up those whose number `up` admits. Meets the library's process if there is a `host`.
    Returns all channels; None for those that are not up in both engines."""
    listeners = [] if session.connector else [socket.create_server(("127.0.0.1", 0)) for _ in nics]
    cookies = [bytes([number]) * 16 for number in range(len(nics))]
    handles = [handle_of(*pair) for pair in zip(listeners, cookies)] or [NO_HANDLE] * len(nics)
    records.send_message(OFFER, SETUP, offer(list(zip(nics, handles)), *([host.invitation()] if host else [])))
    theirs, invitation = read_offer(expect_setup(records, OFFER))
    joined = join(nics, [nic for nic, _ in theirs])
    if not joined:
        raise Failed(ERR_UNSUPPORTED, "no channel can be joined")
    channels = {}
    for number, (own, other) in enumerate(joined):
        if not up(number):
            continue
        if session.connector:
            socks = dial(session, number, theirs[other][1])
        else:
            socks = accept(session, number, listeners[own], cookies[own])
        channels[number] = Channel(session, number, agreed.protect, *socks)
    for listener in listeners:
        listener.close()
    if host:
        host.meet(invitation)
    records.send_message(READY, SETUP, ready(sorted(channels), host is not None))
    theirs = read_ready(expect_setup(records, READY), host is not None)
    records.begin_frames()
    return [channels.get(number) if number in theirs else None for number in range(len(joined))]


# ---- A set-up that joins a connection ----


def join_of(old, new, direction, generation, numbers, opened=None):
    """The join in the Offer that goes in this direction. `old`: the session of the connection; `opened`: how many records of the other side
    its sender has opened, where the control connection moves."""
    name, wanted = old.key(b"uccl connection", b"")[:16], struct.pack(f"<{len(numbers)}H", *numbers)
    moves = b"\x00" if opened is None else struct.pack("<BQ", 1, opened)
    said = direction + new.key(b"uccl join binding", b"") + name + struct.pack("<I", generation) + moves.ljust(9, b"\x00") + wanted
    return name + struct.pack("<IH", generation, len(numbers)) + wanted + moves + mac(old.key(b"uccl join key", b""), said)


def join_channels(old, session, records, agreed, nics, generation, numbers):
    """As set_up_channels, at the connector, for lost channels of a connection; `nics` are those that they had. Returns them by number."""
    ours, theirs = session.directions()
    entries = [(nic, NO_HANDLE) for nic in nics]
    records.send_message(OFFER, SETUP, offer(entries)[:-1] + b"\x01" + join_of(old, session, ours, generation, numbers))
    answer, proof = expect_setup(records, OFFER), b"\x01" + join_of(old, session, theirs, generation, numbers)
    need(answer.endswith(b"\x00\x00" + proof), "an Offer for this join, without an invitation and addresses")
    offered, _ = read_offer(answer[: -len(proof)] + b"\x00")
    need(len(offered) == len(numbers), "an entry for each wanted channel")
    dialled = {number: dial(session, number, handle) for number, (_, handle) in zip(numbers, offered)}
    channels = {number: Channel(session, number, agreed.protect, *socks) for number, socks in dialled.items()}
    records.send_message(READY, SETUP, ready(sorted(channels)))
    return {number: channels[number] for number in read_ready(expect_setup(records, READY))}


def move_control(old, session, records, generation, opened):
    """As join_channels, for the control connection. Returns how many records of this peer the library has opened."""
    ours, theirs = session.directions()
    records.send_message(OFFER, SETUP, b"\x00\x00\x00\x01" + join_of(old, session, ours, generation, [], opened))
    answer = expect_setup(records, OFFER)
    need(len(answer) == 4 + 16 + 6 + 9 + 32 and answer.startswith(b"\x00\x00\x00\x01"), "an Offer without channels")
    known = struct.unpack_from("<Q", answer, 4 + 16 + 6 + 1)[0]
    need(answer[4:] == join_of(old, session, theirs, generation, [], known), "the proof of a join")
    records.send_message(READY, SETUP, ready([]))
    need(not read_ready(expect_setup(records, READY)), "channels of a set-up without any")
    return known


# ---- Data channels ----

SENDS, RECEIVES = 0, 1  # what the engine that dials does


def handle_of(listener, cookie):
    address, port = listener.getsockname()[:2]
    mapped = ipaddress.ip_address("::ffff:" + address).packed
    return struct.pack("<8sIHHI16s16s76x", b"UCCLSOFT", 3, port, 0, 0, mapped, cookie)


def read_handle(handle):
    """(address as connect takes it, cookie)"""
    magic, version, port, _, scope, address, cookie = struct.unpack("<8sIHHI16s16s76x", handle)
    need((magic, version) == (b"UCCLSOFT", 3), "a handle of another plugin")
    address = ipaddress.ip_address(address)
    return (str(address.ipv4_mapped), port) if address.ipv4_mapped else (str(address), port, 0, scope), cookie


def place_of(number):
    """The first set, and the number of the channel in it."""
    return struct.pack("<BH", 0, number)


def data_hello(session, number, dialer, cookie):
    """The first bytes of a data connection. The dialer is the connector, so what it sends goes to the listener."""
    direction = TO_LISTENING if dialer == SENDS else TO_CONNECTING
    said = b"SFTKEYED" + struct.pack("<II", 3, dialer)
    return said + mac(session.key(b"uccl channel mac", direction, place_of(number)), said + cookie)


def dial(session, number, handle):
    """The sockets on which this peer sends and receives."""
    address, cookie = read_handle(handle)
    socks = []
    for dialer in (SENDS, RECEIVES):
        socks.append(socket.create_connection(address[:2], SECONDS))
        socks[-1].sendall(data_hello(session, number, dialer, cookie))
    return socks


def accept(session, number, listener, cookie):
    """As dial, at the listener."""
    socks = {}
    while len(socks) < 2:
        listener.settimeout(SECONDS)
        sock = listener.accept()[0]
        sock.settimeout(SECONDS)
        said = read_exactly(sock, 48)
        dialer = struct.unpack_from("<I", said, 12)[0]
        need(dialer in (SENDS, RECEIVES) and dialer not in socks, "the direction of a data connection")
        need(hmac.compare_digest(said, data_hello(session, number, dialer, cookie)), "the proof of a data connection")
        socks[dialer] = sock
    return socks[RECEIVES], socks[SENDS]


CRC_TABLE = []
for _remainder in range(256):
    for _ in range(8):
        _remainder = _remainder >> 1 ^ (0x82F63B78 if _remainder & 1 else 0)
    CRC_TABLE.append(_remainder)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class Direction:
    """One direction of a data channel: messages with a head."""

    def __init__(self, sock, session, direction, number, protect):
        self.sock, self.number = sock, 0
        self.checksums = protect == INTEGRITY and not session.keyed
        sealed = protect == ENCRYPT or (protect == INTEGRITY and session.keyed)
        self.sealing = Sealing(session.key(b"uccl channel data", direction, place_of(number)), 16_384, 2) if sealed else None

    def next(self):
        self.number += 1
        if self.sealing:
            self.sealing.next()

    def head(self, length, tag):
        return struct.pack("<III", length, (self.number & 0xFFFFFFFF) ^ 0x7C9A51E3, tag)

    def send(self, payload, tag):
        head = self.head(len(payload), tag)
        if self.sealing:
            sealed = self.sealing.cipher.encrypt(self.sealing.nonce(1), payload, None)
            payload = sealed[:-16]
            head = self.sealing.cipher.encrypt(self.sealing.nonce(0), head + sealed[-16:], None)
        elif self.checksums:
            head += struct.pack("<I", crc32c(payload))
            head += struct.pack("<I", crc32c(head))
        self.sock.sendall(head + payload)
        self.next()

    def receive(self, length, tag):
        head = read_exactly(self.sock, 44 if self.sealing else 20 if self.checksums else 12)
        plain = self.sealing.cipher.decrypt(self.sealing.nonce(0), head, None) if self.sealing else head
        need(plain[:12] == self.head(length, tag), f"the head of a message: {plain[:12].hex()}, not {self.head(length, tag).hex()}")
        payload = read_exactly(self.sock, length)
        if self.sealing:
            payload = self.sealing.cipher.decrypt(self.sealing.nonce(1), payload + plain[12:], None)
        elif self.checksums:
            need(struct.unpack("<II", head[12:]) == (crc32c(payload), crc32c(head[:16])), "a checksum of a message")
        self.next()
        return payload


class Channel:
    """Both directions of a data channel."""

    def __init__(self, session, number, protect, out, into):
        sends, receives = session.directions()
        self.out = Direction(out, session, sends, number, protect)
        self.into = Direction(into, session, receives, number, protect)

    def close(self):
        self.out.sock.close()
        self.into.sock.close()

    def reset(self):
        """Closes both with a reset, as if the network had failed."""
        for sock in (self.out.sock, self.into.sock):
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
