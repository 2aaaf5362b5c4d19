"""The sections "Handshake" and "Records" of docs/protocol.md: from a TCP connection to a stream of sealed records, for a connector and for a
listener. Knows no channels and no frames.
"""

import hmac
import struct
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# Status numbers of uccl_engine.h.
OK, ERR_UNSUPPORTED, ERR_CANCELED, ERR_TIMED_OUT, ERR_REMOTE_DISCONNECT = 0, -4, -5, -10, -12
ERR_NOT_FOUND, ERR_AUTH, ERR_PROTOCOL, ERR_REMOTE_ACCESS, ERR_TRUNCATED = -2, -13, -14, -20, -21

OFF, INTEGRITY, ENCRYPT = 0, 1, 2  # protection of the data
SECONDS = 20  # longest wait for anything


class Failed(Exception):
    """The other engine refused, or the connection ended: its status and its text."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


def need(condition, what):
    if not condition:
        raise Failed(ERR_PROTOCOL, what)


def mac(key, data):
    return hmac.new(key, data, sha256).digest()


def expand(prk, info):
    """HKDF-Expand for 32 bytes, which is one block."""
    return mac(prk, info + b"\x01")


def read_exactly(sock, size):
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            n = sock.recv_into(view)
        except ConnectionResetError:
            n = 0
        if n == 0:
            raise Failed(ERR_REMOTE_DISCONNECT, "the peer closed a TCP connection")
        view = view[n:]
    return bytes(data)


class Reader:
    """Fields of a message, one after the other; `end` checks that none is left."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def bytes(self, size):
        need(self.at + size <= len(self.data), "a message is too short")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, layout):
        values = struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))
        return values[0] if len(values) == 1 else values

    def short(self):
        """A length of 1 byte, and so many bytes."""
        return self.bytes(self.unpack("B"))

    def rest(self):
        return self.bytes(len(self.data) - self.at)

    def end(self):
        need(self.at == len(self.data), "a message is too long")


# ---- Handshake ----

MAGIC, VERSION = b"UCCLTCPX", 3
OPENING, ANSWER, PROOF, WELCOME, REFUSAL = 1, 2, 3, 4, 255
TO_LISTENING, TO_CONNECTING = b"to listening", b"to connecting"


def clear_bytes(kind, keyed, size, version=VERSION):
    return struct.pack("<8sHBBHH", MAGIC, version, kind, keyed, size, 0)


def read_message(sock, kind, keyed):
    """Clear bytes and body of the next message, which must be of that kind. A Refusal raises."""
    clear = read_exactly(sock, 16)
    magic, version, found, flags, size, reserved = struct.unpack("<8sHBBHH", clear)
    need(magic == MAGIC, "this is another protocol")
    if found == REFUSAL:
        fields = Reader(read_exactly(sock, size))
        status, oldest, newest = fields.unpack("iHH")
        raise Failed(status, f"{fields.rest().decode('ascii')} (versions {oldest} to {newest})")
    need(version == VERSION, f"the peer speaks version {version}")
    need(found == kind and flags <= 1 and reserved == 0, f"malformed clear bytes {clear.hex()}")
    if flags != keyed:
        raise Failed(ERR_AUTH, "only one engine has a key")
    return clear, read_exactly(sock, size)


def refuse(sock, keyed, failed):
    body = struct.pack("<iHH", failed.status, VERSION, VERSION) + failed.text.encode("ascii")[:240]
    sock.sendall(clear_bytes(REFUSAL, keyed, len(body)) + body)


class Noise:
    """The state of Noise_XXpsk3_25519_AESGCM_SHA256. Its functions are those of the Noise specification."""

    def __init__(self, prologue):
        self.h = self.ck = b"Noise_XXpsk3_25519_AESGCM_SHA256"  # 32 bytes: neither padded nor hashed
        self.key, self.n = None, 0
        self.mix_hash(prologue)

    def mix_hash(self, data):
        self.h = sha256(self.h + data).digest()

    def hkdf(self, data, count):
        prk, last, out = mac(self.ck, data), b"", []
        for i in range(count):
            last = mac(prk, last + bytes([i + 1]))
            out.append(last)
        return out

    def mix_key(self, data):
        self.ck, self.key = self.hkdf(data, 2)
        self.n = 0

    def mix_psk(self, psk):
        self.ck, h, self.key = self.hkdf(psk, 3)
        self.n = 0
        self.mix_hash(h)

    def ephemeral(self, public):
        self.mix_hash(public)
        self.mix_key(public)  # a pattern with a pre-shared key mixes ephemeral keys into the key too

    def exchange(self, private, public):
        try:
            self.mix_key(private.exchange(X25519PublicKey.from_public_bytes(public)))
        except ValueError as zero:
            raise Failed(ERR_PROTOCOL, "a public key of low order") from zero

    def nonce(self):
        self.n += 1
        return struct.pack(">IQ", 0, self.n - 1)

    def seal(self, plain):
        sealed = AESGCM(self.key).encrypt(self.nonce(), plain, self.h)
        self.mix_hash(sealed)
        return sealed

    def open(self, sealed):
        plain = AESGCM(self.key).decrypt(self.nonce(), sealed, self.h)
        self.mix_hash(sealed)
        return plain

    def secret(self):
        """The secret of the state."""
        return b"".join(self.hkdf(b"", 2)) + self.h


def keys_of(key):
    """(pre-shared key of Noise, key of the selector) of a key of the key file, or of none."""
    if key is None:
        return bytes(32), bytes(32)
    prk = mac(b"uccl pre-shared key", key)
    return expand(prk, b"noise"), expand(prk, b"selector")


def public_of(private):
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def instance_of(public):
    return sha256(b"uccl engine" + public).digest()[:16]


class Hello:
    def __init__(self, channels=2, chunk=40_000, gpu=-1, timeout_ms=10_000, protect=OFF, plugin=b"soft", pci=b"-1", asked=b"", further=b"", joins=0):
        self.channels, self.chunk, self.gpu, self.timeout_ms, self.protect = channels, chunk, gpu, timeout_ms, protect
        self.plugin, self.pci, self.asked, self.further, self.joins = plugin, pci, asked, further, joins

    def encode(self):
        texts = (self.plugin, self.pci, self.asked, self.further)
        fixed = struct.pack("<HIiIB", self.channels, self.chunk, self.gpu, self.timeout_ms, self.protect)
        return fixed + b"".join(bytes([len(text)]) + text for text in texts) + bytes([self.joins])

    @classmethod
    def decode(cls, data):
        fields = Reader(data)
        hello = cls(*fields.unpack("HIiIB"), *[fields.short() for _ in range(4)], fields.unpack("B"))
        fields.end()
        need(1 <= hello.channels <= 64 and 4096 <= hello.chunk <= 1 << 24 and -1 <= hello.gpu <= 1023, "hello: a number is out of range")
        need(hello.joins <= 1, "hello: what it is for")
        need(100 <= hello.timeout_ms <= 86_400_000 and hello.protect <= 2, "hello: a number is out of range")
        need(1 <= len(hello.plugin) <= 16 and len(hello.pci) <= 32 and len(hello.asked) <= 64 and len(hello.further) <= 7, "hello: a text")
        return hello

    def agreed(self, other):
        protect = max(self.protect, other.protect)
        over_tcp = {self.plugin, other.plugin} <= {b"soft", b"devmem"}
        if not over_tcp and (self.plugin != other.plugin or protect == ENCRYPT):
            raise Failed(ERR_UNSUPPORTED, f"plugins {self.plugin.decode()} and {other.plugin.decode()}, protection {protect}")
        least = {name: min(getattr(self, name), getattr(other, name)) for name in ("channels", "chunk", "timeout_ms")}
        return Hello(protect=protect, plugin=self.plugin, **least)


class Session:
    """What the handshake leaves: the keys, and the peer's instance."""

    def __init__(self, noise, opening, answer, connector, keyed, peer_public):
        self.prk = mac(opening + answer, noise.secret())
        self.connector, self.keyed, self.peer_instance = connector, keyed, instance_of(peer_public)

    def key(self, purpose, direction, place=b""):
        return expand(self.prk, purpose + direction + place)

    def directions(self):
        """(what this peer sends, what it receives)"""
        return (TO_LISTENING, TO_CONNECTING) if self.connector else (TO_CONNECTING, TO_LISTENING)


def connect_handshake(sock, static, key, hello):
    """Session, records, and the terms that both hellos give."""
    psk, selector_key = keys_of(key)
    keyed, ephemeral = int(key is not None), X25519PrivateKey.generate()
    opening = clear_bytes(OPENING, keyed, 120)
    noise = Noise(opening)
    noise.ephemeral(public_of(ephemeral))
    sock.sendall(opening + public_of(ephemeral) + noise.seal(bytes(72)))

    answer, body = read_message(sock, ANSWER, keyed)
    fields = Reader(body)
    theirs = fields.bytes(32)
    noise.ephemeral(theirs)
    noise.exchange(ephemeral, theirs)
    peer_public = noise.open(fields.bytes(48))
    noise.exchange(ephemeral, peer_public)
    noise.open(fields.bytes(16))
    fields.end()

    selector = mac(selector_key, noise.secret())
    sealed = noise.seal(public_of(static))
    noise.exchange(static, theirs)
    noise.mix_psk(psk)
    proof = selector + sealed + noise.seal(hello.encode())
    sock.sendall(clear_bytes(PROOF, keyed, len(proof)) + proof)

    session = Session(noise, opening, answer, True, keyed, peer_public)
    _, body = read_message(sock, WELCOME, keyed)
    records = Records(sock, session)
    fields = Reader(records.open(body[:2], body[2:]))
    status = fields.unpack("i")
    if status != OK:
        raise Failed(status, fields.rest().decode("ascii"))
    return session, records, hello.agreed(Hello.decode(fields.rest()))


def accept_handshake(sock, static, keys, hello):
    """As connect_handshake; `keys` are those of a key file, all of which count."""
    keyed = int(bool(keys))
    try:
        noise, opening, answer, ephemeral, theirs = take_opening(sock, static, keyed)
        secret = noise.secret()
        _, body = read_message(sock, PROOF, keyed)
        fields = Reader(body)
        selector = fields.bytes(32)
        fits = [psk for psk, selector_key in map(keys_of, keys or [None]) if hmac.compare_digest(mac(selector_key, secret), selector)]
        if not fits:
            raise Failed(ERR_AUTH, "the keys differ")
        peer_public = noise.open(fields.bytes(48))
        noise.exchange(ephemeral, peer_public)
        noise.mix_psk(fits[0])
        payload = noise.open(fields.rest())
    except Failed as failed:
        refuse(sock, keyed, failed)
        raise
    session = Session(noise, opening, answer, False, keyed, peer_public)
    records = Records(sock, session)

    def welcome(plain):
        record = records.seal(plain)
        sock.sendall(clear_bytes(WELCOME, keyed, len(record)) + record)

    try:
        agreed = hello.agreed(Hello.decode(payload))
    except Failed as failed:
        welcome(struct.pack("<i", failed.status) + failed.text.encode("ascii"))
        raise
    welcome(struct.pack("<i", OK) + hello.encode())
    return session, records, agreed


def take_opening(sock, static, keyed):
    ephemeral = X25519PrivateKey.generate()
    opening, body = read_message(sock, OPENING, keyed)
    need(len(body) == 120, "an Opening of a wrong length")
    noise, theirs = Noise(opening), body[:32]
    noise.ephemeral(theirs)
    noise.open(body[32:])
    answer = clear_bytes(ANSWER, keyed, 96)
    noise.ephemeral(public_of(ephemeral))
    noise.exchange(ephemeral, theirs)
    sealed = noise.seal(public_of(static))
    noise.exchange(static, theirs)
    sock.sendall(answer + public_of(ephemeral) + sealed + noise.seal(b""))
    return noise, opening, answer, ephemeral, theirs


# ---- Records ----


class Sealing:
    """AES-256-GCM with a number for each unit, and a key that is replaced after `period` units."""

    def __init__(self, key, period, change):
        self.cipher, self.number, self.period, self.change = AESGCM(key), 0, period, change

    def nonce(self, first=0):
        return struct.pack(">IQ", first, self.number)

    def next(self):
        self.number += 1
        if self.number % self.period == 0:
            self.cipher = AESGCM(self.cipher.encrypt(self.nonce(self.change), bytes(32), None)[:32])


class Records:
    """The stream in the records, both ways. `largest`: bytes of the stream in a record that this peer sends. Once frames have begun it keeps
    what the peer has not acknowledged."""

    def __init__(self, sock, session):
        out, into = session.directions()
        self.sock, self.largest, self.plain, self.frames = sock, 65_510, b"", False
        self.sent, self.acknowledged, self.news = {}, 0, 0
        self.out = Sealing(session.key(b"uccl control", out), 65_536, 1)
        self.into = Sealing(session.key(b"uccl control", into), 65_536, 1)

    def seal(self, plain):
        length = struct.pack("<H", len(plain))
        sealed = self.out.cipher.encrypt(self.out.nonce(), plain, length)
        self.out.next()
        return length + sealed

    def open(self, length, sealed):
        plain = self.into.cipher.decrypt(self.into.nonce(), sealed, length)
        need(1 <= len(plain) <= 65_518, "the length of a record")
        self.into.next()
        return plain

    def begin_frames(self):
        """The set-up is over: each record says how many of the other side's were opened."""
        need(not self.plain, "frames in the record of the set-up's last message")
        self.frames = True

    def send(self, data):
        for at in range(0, len(data), self.largest):
            self.send_record(data[at : at + self.largest])

    def send_record(self, data):
        number = self.out.number
        record = self.seal(struct.pack("<Q", self.into.number) + data if self.frames else data)
        if self.frames:
            self.sent[number], self.news = record, 0
        self.sock.sendall(record)

    def stripped(self, plain):
        """The bytes of the stream in a record."""
        if not self.frames:
            return plain
        need(len(plain) >= 8, "the number in front of the frames")
        said = struct.unpack_from("<Q", plain)[0]
        need(self.acknowledged <= said <= self.out.number, "the number of opened records")
        for number in range(self.acknowledged, said):
            self.sent.pop(number, None)
        self.acknowledged, self.news = said, self.news + len(plain)
        if self.news >= 65_536:
            self.send_record(b"")
        return plain[8:]

    def move(self, sock, known):
        """Goes on over another socket. The other side has opened all records below `known`."""
        self.sock, self.sent = sock, {number: record for number, record in self.sent.items() if number >= known}
        for record in self.sent.values():
            sock.sendall(record)

    def read(self, size):
        """The next bytes of the stream."""
        parts, have = [self.plain], len(self.plain)
        while have < size:
            length = read_exactly(self.sock, 2)
            parts.append(self.stripped(self.open(length, read_exactly(self.sock, struct.unpack("<H", length)[0] + 16))))
            have += len(parts[-1])
        data = b"".join(parts)
        self.plain = data[size:]
        return data[:size]

    def send_message(self, kind, mark, payload):
        """A message of the set-up, or a frame: `mark` says which."""
        self.send(struct.pack("<IBBBB", len(payload), kind, mark, 0, 0) + payload)

    def read_message(self, mark):
        size, kind, found, zero, zero2 = struct.unpack("<IBBBB", self.read(8))
        need((found, zero, zero2) == (mark, 0, 0), "the header of a message")
        return kind, self.read(size)
