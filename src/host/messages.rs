//! What two linked processes tell each other on their Unix socket after the introduction: allocations that may be pulled from, answers
//! to that, their end, regions that may be used without asking, and a ring for a side that sleeps. Pure: bytes in, notes out. Little-endian.

use super::memory::{Export, ExportKind};
use crate::status::{bail, Result};
use crate::types::{Place, RemoteAccess};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Leave to use a region without asking, as its owner tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Where its words lie, and which of the grants there it is.
    pub slot: u32,
    pub generation: u64,
    /// The region and its token, which the receiver has shown before.
    pub region: u64,
    pub token: [u8; 16],
    /// Its bytes.
    pub addr: u64,
    pub len: u64,
    /// Where it lies, and where the receiver's memory lies that it is for.
    pub there: Place,
    pub here: Place,
    pub access: RemoteAccess,
    /// The exports that it lies in, rising; none where nothing has to be mapped.
    pub exports: Vec<u32>,
}

/// A note.
#[derive(Debug)]
pub(crate) enum Note {
    /// Chunks were taken.
    Ring,
    /// Memory at `there` of the sender may be pulled into memory at `here` of the receiver.
    Share { id: u32, there: Place, here: Place, export: Export },
    /// The receiver of the note can pull from it, or cannot.
    Answer { id: u32, open: bool },
    /// It may not be pulled from any more.
    End { id: u32 },
    /// Memory of the sender's library at `there` that the receiver may write to from memory at `here`.
    Area { there: Place, here: Place, export: Export },
    /// A region may be used without asking.
    Grant(Box<Granted>),
    /// It may not any more.
    Revoke { slot: u32, generation: u64 },
}

const RING: u8 = 1;
const SHARE: u8 = 2;
const ANSWER: u8 = 3;
const END: u8 = 4;
const GRANT: u8 = 5;
const REVOKE: u8 = 6;
const AREA: u8 = 7;
/// Bytes of the longest note.
pub(crate) const MAX_NOTE: usize = 1 + 4 + 3 + 8 + 8 + 16 + 64;
/// Exports of a granted region at most, and bytes of a grant besides them.
pub(crate) const MAX_EXPORTS: usize = 1000;
const GRANT_BYTES: usize = 4 + 8 + 8 + 16 + 8 + 8 + 3;

impl Note {
    /// The descriptor that travels beside it.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Note::Share { export, .. } | Note::Area { export, .. } => export.fd.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// The note's bytes; a descriptor travels beside them.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAX_NOTE);
        match self {
            Note::Ring => out.push(RING),
            Note::Share { id, there, here, export } => exported(&mut out, (SHARE, *id), (*there, *here), export),
            Note::Area { there, here, export } => exported(&mut out, (AREA, 0), (*there, *here), export),
            Note::Answer { id, open } => {
                out.push(ANSWER);
                out.extend_from_slice(&id.to_le_bytes());
                out.push(u8::from(*open));
            }
            Note::End { id } => {
                out.push(END);
                out.extend_from_slice(&id.to_le_bytes());
            }
            Note::Grant(granted) => {
                out.push(GRANT);
                out.extend_from_slice(&granted.slot.to_le_bytes());
                for number in [granted.generation, granted.region, granted.addr, granted.len] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out.extend_from_slice(&granted.token);
                let RemoteAccess { read, write } = granted.access;
                out.extend_from_slice(&[granted.there.0, granted.here.0, u8::from(read) | u8::from(write) << 1]);
                granted.exports.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
            }
            Note::Revoke { slot, generation } => {
                out.push(REVOKE);
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&generation.to_le_bytes());
            }
        }
        out
    }

    /// The note in exactly these bytes. Descriptors that it has no use for are closed.
    ///
    /// # Errors
    /// `Protocol`.
    pub(crate) fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Note> {
        let Some((&kind, body)) = bytes.split_first() else { bail!(Protocol, "an empty note of the peer's process") };
        let note = match (kind, body.len()) {
            (RING, 0) => Note::Ring,
            (ANSWER, 5) if body[4] <= 1 => Note::Answer { id: number(body), open: body[4] == 1 },
            (END, 4) => Note::End { id: number(body) },
            (SHARE, _) if bytes.len() == MAX_NOTE => {
                let (there, here, export) = export(body, fds)?;
                Note::Share { id: number(body), there, here, export }
            }
            (AREA, _) if bytes.len() == MAX_NOTE && number(body) == 0 => {
                let (there, here, export) = export(body, fds)?;
                Note::Area { there, here, export }
            }
            (GRANT, n) if (GRANT_BYTES..=GRANT_BYTES + 4 * MAX_EXPORTS).contains(&n) && (n - GRANT_BYTES) % 4 == 0 => {
                grant(body)?
            }
            (REVOKE, 12) => Note::Revoke { slot: number(body), generation: long(body, 4) },
            _ => bail!(Protocol, "a note of kind {kind} and {} bytes of the peer's process", bytes.len()),
        };
        Ok(note)
    }
}

/// Of a note whose descriptor did not come: the export that it would have shared.
pub(crate) fn share_of(bytes: &[u8]) -> Option<u32> {
    let (&kind, body) = bytes.split_first()?;
    (kind == SHARE && bytes.len() == MAX_NOTE).then(|| number(body))
}

fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
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
    if len == 0 || base.checked_add(len).is_none() || !there.is_device() || !here.is_device() {
        bail!(Protocol, "an export of {len} bytes at {base:#x} of {there:?}");
    }
    if fds.len() != usize::from(kind.has_fd()) {
        bail!(Protocol, "an export of kind {kind:?} with {} descriptors", fds.len());
    }
    Ok((there, here, Export { kind, handle, fd: fds.pop(), base, len, gpu }))
}

fn grant(body: &[u8]) -> Result<Note> {
    let mut token = [0; 16];
    token.copy_from_slice(&body[36..52]);
    let (there, here, access) = (Place(body[52]), Place(body[53]), body[54]);
    let (addr, len) = (long(body, 20), long(body, 28));
    if access > 3 || len == 0 || addr.checked_add(len).is_none() {
        bail!(Protocol, "a grant of {len} bytes at {addr:#x} of {there:?}");
    }
    Ok(Note::Grant(Box::new(Granted {
        slot: number(body),
        generation: long(body, 4),
        region: long(body, 12),
        token,
        addr,
        len,
        there,
        here,
        access: RemoteAccess { read: access & 1 != 0, write: access & 2 != 0 },
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
    fn notes_round_trip() {
        for kind in [ExportKind::CudaIpc, ExportKind::Posix, ExportKind::SharedMemory] {
            let note = Note::Share { id: 77, there: Place::gpu(1), here: Place::gpu(2), export: exported(kind) };
            let bytes = note.encode();
            assert_eq!((bytes.len(), share_of(&bytes)), (MAX_NOTE, Some(77)));
            assert_eq!(share_of(&bytes[..MAX_NOTE - 1]), None);
            let fds = || exported(kind).fd.into_iter().collect();
            match Note::decode(&bytes, fds()).unwrap() {
                Note::Share { id: 77, there: Place(2), here: Place(3), export } => {
                    assert_eq!((export.kind, export.base, export.len), (kind, 0x7000_0000, 12345));
                    assert!(export.handle == [7; 64] && export.gpu == [9; 16] && export.fd.is_some() == kind.has_fd());
                }
                other => panic!("{other:?}"),
            }
            let mut too_many = exported(ExportKind::Posix).fd.into_iter().chain(exported(ExportKind::Posix).fd).collect();
            assert!(Note::decode(&bytes, std::mem::take(&mut too_many)).is_err());
            for (at, value) in [(5, 0), (6, 0), (7, 4), (7, 0), (8 + 7, 0xFF)] {
                let mut bad = bytes.clone();
                bad[at] = value;
                if at == 15 {
                    bad[8..24].fill(0xFF);
                }
                assert!(Note::decode(&bad, fds()).is_err(), "byte {at}");
            }
        }
        let area = Note::Area { there: Place::gpu(1), here: Place::gpu(2), export: exported(ExportKind::Posix) };
        let bytes = area.encode();
        let got = Note::decode(&bytes, exported(ExportKind::Posix).fd.into_iter().collect()).unwrap();
        assert!(
            matches!(&got, Note::Area { there: Place(2), here: Place(3), export } if export.len == 12345 && got.fd().is_some())
        );
        assert!(Note::decode(&bytes, Vec::new()).is_err() && area.fd().is_some());
        assert_eq!([share_of(&bytes), share_of(&[])], [None; 2]);
        assert!(matches!(Note::decode(&Note::Ring.encode(), Vec::new()), Ok(Note::Ring)));
        assert!(matches!(
            Note::decode(&Note::Answer { id: 5, open: true }.encode(), Vec::new()),
            Ok(Note::Answer { id: 5, open: true })
        ));
        assert!(matches!(Note::decode(&Note::End { id: 6 }.encode(), Vec::new()), Ok(Note::End { id: 6 })));
        let revoke = Note::Revoke { slot: 3, generation: 1 << 40 };
        assert!(matches!(
            Note::decode(&revoke.encode(), Vec::new()),
            Ok(Note::Revoke { slot: 3, generation }) if generation == 1 << 40
        ));
    }

    #[test]
    fn grants_round_trip() {
        for exports in [vec![], vec![7], (0..MAX_EXPORTS as u32).collect()] {
            for access in [RemoteAccess::ALL, RemoteAccess::READ, RemoteAccess::WRITE] {
                let (there, here) = (Place::gpu(1), Place::gpu(2));
                let (slot, generation, region, token, addr, len) = (5, 1 << 33, 77, [9; 16], 0x7000_0000, 12345);
                let exports = exports.clone();
                let granted = Granted { slot, generation, region, token, addr, len, there, here, access, exports };
                let bytes = Note::Grant(Box::new(granted.clone())).encode();
                assert!(bytes.len() <= super::super::socket::MAX_MESSAGE);
                assert!(matches!(Note::decode(&bytes, Vec::new()), Ok(Note::Grant(got)) if *got == granted));
                assert!(Note::decode(&bytes[..bytes.len() - 1], Vec::new()).is_err());
                for (at, value) in [(29, 0xFF), (55, 4)] {
                    let mut bad = bytes.clone();
                    bad[at..=at].fill(value);
                    if at == 29 {
                        bad[21..37].fill(0xFF);
                    }
                    assert!(Note::decode(&bad, Vec::new()).is_err(), "byte {at}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn anything_is_a_note_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120), kind in 0u8..8) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = kind; }
            let _ = Note::decode(&bytes, Vec::new());
            bytes.resize(MAX_NOTE, 1);
            let _ = Note::decode(&bytes, Vec::new());
        }
    }
}
