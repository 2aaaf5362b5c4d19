//! The messages of two linked processes on their Unix socket after the introduction: which allocations may be read, answers to
//! that, claims of regions and what came of them, and a ring of the doorbell. Pure: bytes in, messages out. Little-endian.

use super::memory::{Export, ExportKind};
use crate::status::{bail, Result, StatusCode};
use crate::types::{Place, RemoteAccess};
use crate::wire::text;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A region that the receiver may use by direct transfers, as its owner describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Where the grant's words lie, and which of the grants there it is.
    pub slot: u32,
    pub generation: u64,
    /// The region and its token, which the receiver has claimed.
    pub region: u64,
    pub token: [u8; 16],
    /// Its bytes.
    pub addr: u64,
    pub len: u64,
    /// Where it lies, and where the receiver's memory lies that it is for.
    pub there: Place,
    pub here: Place,
    /// What its owner allows.
    pub access: RemoteAccess,
    /// What can be done directly; the rest goes over channels.
    pub direct: RemoteAccess,
    /// The exports that it lies in, rising; none where nothing has to be mapped.
    pub exports: Vec<u32>,
}

/// A message.
#[derive(Debug)]
pub(crate) enum Message {
    /// Something has ended, or waits to be copied.
    Ring,
    /// Memory at `there` of the sender may be read into memory at `here` of the receiver.
    Share { id: u32, there: Place, here: Place, export: Export },
    /// The receiver of this message can read it, or cannot.
    Answer { id: u32, open: bool },
    /// It may no longer be read.
    End { id: u32 },
    /// Memory of the sender's library at `there` that the receiver may write to from memory at `here`.
    Area { there: Place, here: Place, export: Export },
    /// The sender wants to use a region of the receiver for its own memory at `place`: once for each region and place.
    Claim { region: u64, token: [u8; 16], place: Place },
    /// The receiver of the message may use a region: the answer to a claim.
    Grant(Box<Granted>),
    /// It may not: the other answer to a claim. Without a reason direct transfers cannot reach the region, and channels carry it.
    Refuse { region: u64, token: [u8; 16], place: Place, why: Option<(StatusCode, String)> },
    /// A granted region has ended.
    Revoke { slot: u32, generation: u64 },
}

const RING: u8 = 1;
const SHARE: u8 = 2;
const ANSWER: u8 = 3;
const END: u8 = 4;
const GRANT: u8 = 5;
const REVOKE: u8 = 6;
const AREA: u8 = 7;
const CLAIM: u8 = 8;
const REFUSE: u8 = 9;
/// Bytes of a message with an export.
pub(crate) const EXPORT_BYTES: usize = 1 + 4 + 3 + 8 + 8 + 16 + 64;
/// Exports of a granted region at most, and bytes of a grant besides them.
pub(crate) const MAX_EXPORTS: usize = 1000;
const GRANT_BYTES: usize = 4 + 8 + 8 + 16 + 8 + 8 + 3;
/// Bytes of a claim, and of the text of a refusal at most.
const CLAIM_BYTES: usize = 8 + 16 + 1;
const MAX_TEXT: usize = 512;

impl Message {
    /// The descriptor that travels beside it.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Message::Share { export, .. } | Message::Area { export, .. } => export.fd.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// The message's bytes; a descriptor travels beside them.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(EXPORT_BYTES);
        match self {
            Message::Ring => out.push(RING),
            Message::Share { id, there, here, export } => exported(&mut out, (SHARE, *id), (*there, *here), export),
            Message::Area { there, here, export } => exported(&mut out, (AREA, 0), (*there, *here), export),
            Message::Answer { id, open } => {
                out.push(ANSWER);
                out.extend_from_slice(&id.to_le_bytes());
                out.push(u8::from(*open));
            }
            Message::End { id } => {
                out.push(END);
                out.extend_from_slice(&id.to_le_bytes());
            }
            Message::Grant(granted) => {
                out.push(GRANT);
                out.extend_from_slice(&granted.slot.to_le_bytes());
                for number in [granted.generation, granted.region, granted.addr, granted.len] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out.extend_from_slice(&granted.token);
                out.extend_from_slice(&[granted.there.0, granted.here.0, bits(granted.access) | bits(granted.direct) << 2]);
                granted.exports.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
            }
            Message::Claim { region, token, place } => claimed(&mut out, CLAIM, (*region, token, *place)),
            Message::Refuse { region, token, place, why } => {
                claimed(&mut out, REFUSE, (*region, token, *place));
                if let Some((status, text)) = why {
                    out.extend_from_slice(&status.to_le_bytes());
                    out.extend_from_slice(text::printable(text, MAX_TEXT).as_bytes());
                }
            }
            Message::Revoke { slot, generation } => {
                out.push(REVOKE);
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&generation.to_le_bytes());
            }
        }
        out
    }

    /// The message in exactly these bytes. Descriptors that it has no use for are closed.
    ///
    /// # Errors
    /// `Protocol`.
    pub(crate) fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Message> {
        let Some((&kind, body)) = bytes.split_first() else { bail!(Protocol, "an empty message of the peer's process") };
        let message = match (kind, body.len()) {
            (RING, 0) => Message::Ring,
            (ANSWER, 5) if body[4] <= 1 => Message::Answer { id: number(body), open: body[4] == 1 },
            (END, 4) => Message::End { id: number(body) },
            (SHARE, _) if bytes.len() == EXPORT_BYTES && Place(body[4]).is_device() => {
                let (there, here, export) = export(body, fds)?;
                Message::Share { id: number(body), there, here, export }
            }
            (AREA, _) if bytes.len() == EXPORT_BYTES && number(body) == 0 => {
                let (there, here, export) = export(body, fds)?;
                Message::Area { there, here, export }
            }
            (GRANT, n) if (GRANT_BYTES..=GRANT_BYTES + 4 * MAX_EXPORTS).contains(&n) && (n - GRANT_BYTES) % 4 == 0 => {
                grant(body)?
            }
            (CLAIM, CLAIM_BYTES) => {
                let (region, token, place) = claim(body);
                Message::Claim { region, token, place }
            }
            (REFUSE, CLAIM_BYTES) => {
                let (region, token, place) = claim(body);
                Message::Refuse { region, token, place, why: None }
            }
            (REFUSE, n) if n >= CLAIM_BYTES + 4 => {
                let (region, token, place) = claim(body);
                let text = text::checked(&body[CLAIM_BYTES + 4..], MAX_TEXT, "the reason of a refusal")?;
                let status = number(&body[CLAIM_BYTES..]) as StatusCode;
                Message::Refuse { region, token, place, why: Some((status, text.to_owned())) }
            }
            (REVOKE, 12) => Message::Revoke { slot: number(body), generation: long(body, 4) },
            _ => bail!(Protocol, "a message of kind {kind} and {} bytes of the peer's process", bytes.len()),
        };
        Ok(message)
    }
}

/// Of a message whose descriptor did not come: the export that it would have shared.
pub(crate) fn share_of(bytes: &[u8]) -> Option<u32> {
    let (&kind, body) = bytes.split_first()?;
    (kind == SHARE && bytes.len() == EXPORT_BYTES).then(|| number(body))
}

fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn claimed(out: &mut Vec<u8>, kind: u8, (region, token, place): (u64, &[u8; 16], Place)) {
    out.push(kind);
    out.extend_from_slice(&region.to_le_bytes());
    out.extend_from_slice(token);
    out.push(place.0);
}

/// What is claimed or refused, in at least [`CLAIM_BYTES`].
fn claim(body: &[u8]) -> (u64, [u8; 16], Place) {
    let mut token = [0; 16];
    token.copy_from_slice(&body[8..24]);
    (long(body, 0), token, Place(body[24]))
}

fn bits(access: RemoteAccess) -> u8 {
    u8::from(access.read) | u8::from(access.write) << 1
}

fn access(bits: u8) -> RemoteAccess {
    RemoteAccess { read: bits & 1 != 0, write: bits & 2 != 0 }
}

fn exported(out: &mut Vec<u8>, (kind, id): (u8, u32), (there, here): (Place, Place), export: &Export) {
    out.push(kind);
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&[there.0, here.0, export.kind as u8]);
    out.extend_from_slice(&export.base.to_le_bytes());
    out.extend_from_slice(&export.len.to_le_bytes());
    out.extend_from_slice(&export.gpu);
    out.extend_from_slice(&export.handle);
}

/// An export, and the places of its sender and its receiver.
fn export(body: &[u8], mut fds: Vec<OwnedFd>) -> Result<(Place, Place, Export)> {
    let (there, here) = (Place(body[4]), Place(body[5]));
    let Some(kind) = ExportKind::from_number(body[6]) else { bail!(Protocol, "an export of kind {}", body[6]) };
    let (base, len) = (long(body, 7), long(body, 15));
    let (mut gpu, mut handle) = ([0; 16], [0; 64]);
    gpu.copy_from_slice(&body[23..39]);
    handle.copy_from_slice(&body[39..103]);
    // Of host memory only areas are mapped, which are memory files.
    let strange = there.is_device() != here.is_device() || !there.is_device() && kind != ExportKind::SharedMemory;
    if len == 0 || base.checked_add(len).is_none() || strange {
        bail!(Protocol, "an export of {len} bytes at {base:#x} of {there:?}");
    }
    if fds.len() != usize::from(kind.has_fd()) {
        bail!(Protocol, "an export of kind {kind:?} with {} descriptors", fds.len());
    }
    Ok((there, here, Export { kind, handle, fd: fds.pop(), base, len, gpu }))
}

fn grant(body: &[u8]) -> Result<Message> {
    let mut token = [0; 16];
    token.copy_from_slice(&body[36..52]);
    let (there, here, allowed) = (Place(body[52]), Place(body[53]), body[54]);
    let (addr, len) = (long(body, 20), long(body, 28));
    if allowed > 15 || len == 0 || addr.checked_add(len).is_none() {
        bail!(Protocol, "a grant of {len} bytes at {addr:#x} of {there:?}");
    }
    Ok(Message::Grant(Box::new(Granted {
        slot: number(body),
        generation: long(body, 4),
        region: long(body, 12),
        token,
        addr,
        len,
        there,
        here,
        access: access(allowed),
        direct: access(allowed >> 2),
        exports: body[GRANT_BYTES..].chunks_exact(4).map(number).collect(),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exported(kind: ExportKind) -> Export {
        let fd = kind.has_fd().then(|| std::fs::File::open("/dev/null").unwrap().into());
        Export { kind, handle: [7; 64], fd, base: 0x7000_0000, len: 12345, gpu: [9; 16] }
    }

    #[test]
    fn messages_round_trip() {
        for kind in [ExportKind::CudaIpc, ExportKind::Posix, ExportKind::SharedMemory] {
            let message = Message::Share { id: 77, there: Place::gpu(1), here: Place::gpu(2), export: exported(kind) };
            let bytes = message.encode();
            assert_eq!((bytes.len(), share_of(&bytes)), (EXPORT_BYTES, Some(77)));
            assert_eq!(share_of(&bytes[..EXPORT_BYTES - 1]), None);
            let fds = || exported(kind).fd.into_iter().collect();
            match Message::decode(&bytes, fds()).unwrap() {
                Message::Share { id: 77, there: Place(2), here: Place(3), export } => {
                    assert_eq!((export.kind, export.base, export.len), (kind, 0x7000_0000, 12345));
                    assert!(export.handle == [7; 64] && export.gpu == [9; 16] && export.fd.is_some() == kind.has_fd());
                }
                other => panic!("{other:?}"),
            }
            let mut too_many = exported(ExportKind::Posix).fd.into_iter().chain(exported(ExportKind::Posix).fd).collect();
            assert!(Message::decode(&bytes, std::mem::take(&mut too_many)).is_err());
            for (at, value) in [(5, 0), (6, 0), (7, 4), (7, 0), (8 + 7, 0xFF)] {
                let mut bad = bytes.clone();
                bad[at] = value;
                if at == 15 {
                    bad[8..24].fill(0xFF);
                }
                assert!(Message::decode(&bad, fds()).is_err(), "byte {at}");
            }
        }
        let area = Message::Area { there: Place::gpu(1), here: Place::gpu(2), export: exported(ExportKind::Posix) };
        let bytes = area.encode();
        let got = Message::decode(&bytes, exported(ExportKind::Posix).fd.into_iter().collect()).unwrap();
        assert!(
            matches!(&got, Message::Area { there: Place(2), here: Place(3), export } if export.len == 12345 && got.fd().is_some())
        );
        assert!(Message::decode(&bytes, Vec::new()).is_err() && area.fd().is_some());
        assert_eq!([share_of(&bytes), share_of(&[])], [None; 2]);
        assert!(matches!(Message::decode(&Message::Ring.encode(), Vec::new()), Ok(Message::Ring)));
        assert!(matches!(
            Message::decode(&Message::Answer { id: 5, open: true }.encode(), Vec::new()),
            Ok(Message::Answer { id: 5, open: true })
        ));
        assert!(matches!(Message::decode(&Message::End { id: 6 }.encode(), Vec::new()), Ok(Message::End { id: 6 })));
        let revoke = Message::Revoke { slot: 3, generation: 1 << 40 };
        assert!(matches!(
            Message::decode(&revoke.encode(), Vec::new()),
            Ok(Message::Revoke { slot: 3, generation }) if generation == 1 << 40
        ));
    }

    #[test]
    fn claims_and_refusals_round_trip() {
        let (region, token, place) = (1 << 40 | 5, [3; 16], Place::gpu(1));
        let bytes = Message::Claim { region, token, place }.encode();
        assert!(
            matches!(Message::decode(&bytes, Vec::new()), Ok(Message::Claim { region: r, token: t, place: p }) if (r, t, p) == (region, token, place))
        );
        for why in [None, Some((-20, String::new())), Some((-20, "region 5 is not registered".to_owned()))] {
            let bytes = Message::Refuse { region, token, place, why: why.clone() }.encode();
            match Message::decode(&bytes, Vec::new()).unwrap() {
                Message::Refuse { region: r, token: t, place: p, why: got } => {
                    assert_eq!((r, t, p, got), (region, token, place, why))
                }
                other => panic!("{other:?}"),
            }
        }
        let long = Message::Refuse { region, token, place, why: Some((-20, "x".repeat(2 * MAX_TEXT))) }.encode();
        assert!(long.len() <= super::super::socket::MAX_MESSAGE && Message::decode(&long, Vec::new()).is_ok());
        let mut forged = Message::Refuse { region, token, place, why: Some((-20, "a line".to_owned())) }.encode();
        *forged.last_mut().unwrap() = b'\n';
        assert!(Message::decode(&forged, Vec::new()).is_err() && Message::decode(&bytes[..bytes.len() - 1], Vec::new()).is_err());
    }

    #[test]
    fn grants_round_trip() {
        for exports in [vec![], vec![7], (0..MAX_EXPORTS as u32).collect()] {
            for access in [RemoteAccess::ALL, RemoteAccess::READ, RemoteAccess::WRITE] {
                let (there, here) = (Place::gpu(1), Place::gpu(2));
                let (slot, generation, region, token, addr, len) = (5, 1 << 33, 77, [9; 16], 0x7000_0000, 12345);
                let exports = exports.clone();
                let direct = RemoteAccess { read: access.write, write: access.read };
                let granted = Granted { slot, generation, region, token, addr, len, there, here, access, direct, exports };
                let bytes = Message::Grant(Box::new(granted.clone())).encode();
                assert!(bytes.len() <= super::super::socket::MAX_MESSAGE);
                assert!(matches!(Message::decode(&bytes, Vec::new()), Ok(Message::Grant(got)) if *got == granted));
                assert!(Message::decode(&bytes[..bytes.len() - 1], Vec::new()).is_err());
                for (at, value) in [(29, 0xFF), (55, 16)] {
                    let mut bad = bytes.clone();
                    bad[at..=at].fill(value);
                    if at == 29 {
                        bad[21..37].fill(0xFF);
                    }
                    assert!(Message::decode(&bad, Vec::new()).is_err(), "byte {at}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn anything_is_a_note_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120), kind in 0u8..8) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = kind; }
            let _ = Message::decode(&bytes, Vec::new());
            bytes.resize(EXPORT_BYTES, 1);
            let _ = Message::decode(&bytes, Vec::new());
        }
    }
}
