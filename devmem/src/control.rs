//! The control messages of a received call: which bytes lie where. No system calls.

const LEVEL_SOCKET: i32 = 1;
const LINEAR: i32 = 78;
const DEVICE: i32 = 79;
const HEAD: usize = 16;
const BODY: usize = 24;

/// Room that one piece takes in a control buffer.
pub const PIECE_SPACE: usize = HEAD + BODY;

/// Bytes of a connection that lie in device memory, until their token is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where in the dma-buf.
    pub offset: u64,
    /// How many.
    pub length: u32,
    /// To be given back once.
    pub token: u32,
    /// Whose dma-buf.
    pub binding: u32,
}

/// The next bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// In device memory.
    Device(Fragment),
    /// So many in the caller's buffer, after those of earlier pieces of this kind.
    Linear(u32),
}

impl Piece {
    /// How many bytes.
    pub fn length(&self) -> usize {
        match self {
            Piece::Device(fragment) => fragment.length as usize,
            Piece::Linear(length) => *length as usize,
        }
    }

    /// As the kernel writes it.
    #[cfg(test)]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (kind, fragment) = match *self {
            Piece::Device(fragment) => (DEVICE, fragment),
            Piece::Linear(length) => (LINEAR, Fragment { offset: 0, length, token: 0, binding: 0 }),
        };
        let mut body = fragment.offset.to_ne_bytes().to_vec();
        for number in [fragment.length, fragment.token, fragment.binding, 0] {
            body.extend(number.to_ne_bytes());
        }
        message(LEVEL_SOCKET, kind, &body)
    }
}

#[cfg(test)]
fn message(level: i32, kind: i32, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((HEAD + body.len()) as u64).to_ne_bytes().to_vec();
    bytes.extend(level.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Bytes that are not what the kernel writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The pieces in a control buffer, as far as the kernel filled it, in the order of the stream. Other control messages are passed over.
pub fn pieces(control: &[u8]) -> impl Iterator<Item = Result<Piece, Malformed>> + '_ {
    let mut rest = control;
    std::iter::from_fn(move || loop {
        if rest.is_empty() {
            return None;
        }
        let Some((length, level, kind)) = head(rest) else {
            rest = &[];
            return Some(Err(Malformed));
        };
        let body = &rest[HEAD..length];
        rest = rest.get(length.next_multiple_of(8)..).unwrap_or(&[]);
        if level != LEVEL_SOCKET || (kind != LINEAR && kind != DEVICE) {
            continue;
        }
        let Ok(body) = <&[u8; BODY]>::try_from(body) else { return Some(Err(Malformed)) };
        let fragment = Fragment {
            offset: u64::from_ne_bytes(at(body, 0)),
            length: number(body, 8),
            token: number(body, 12),
            binding: number(body, 16),
        };
        return Some(Ok(if kind == DEVICE { Piece::Device(fragment) } else { Piece::Linear(fragment.length) }));
    })
}

/// The length, level and kind of the first message, if it lies within the bytes.
fn head(bytes: &[u8]) -> Option<(usize, i32, i32)> {
    if bytes.len() < HEAD {
        return None;
    }
    let length = usize::try_from(u64::from_ne_bytes(at(bytes, 0))).ok()?;
    let head = (length, i32::from_ne_bytes(at(bytes, 8)), i32::from_ne_bytes(at(bytes, 12)));
    (HEAD..=bytes.len()).contains(&length).then_some(head)
}

fn number(bytes: &[u8], from: usize) -> u32 {
    u32::from_ne_bytes(at(bytes, from))
}

/// The caller has checked the length.
fn at<const N: usize>(bytes: &[u8], from: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[from..from + N]);
    array
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_piece() -> impl Strategy<Value = Piece> {
        prop_oneof![
            any::<u32>().prop_map(Piece::Linear),
            (any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>())
                .prop_map(|(offset, length, token, binding)| Piece::Device(Fragment { offset, length, token, binding })),
        ]
    }

    proptest! {
        #[test]
        fn reads_what_the_kernel_writes(all in proptest::collection::vec(any_piece(), 0..20), other in any::<u16>()) {
            let mut control = Vec::new();
            for piece in &all {
                control.extend(message(LEVEL_SOCKET, 1000 + i32::from(other), &[1, 2, 3]));
                control.extend(piece.encode());
            }
            prop_assert_eq!(pieces(&control).collect::<Result<Vec<_>, _>>(), Ok(all));
        }

        #[test]
        fn any_bytes_end(control in proptest::collection::vec(any::<u8>(), 0..200), length in 0..80u64) {
            pieces(&control).for_each(drop);
            // A length that fits more often than a random one.
            let mut control = control;
            if control.len() >= 8 {
                control[..8].copy_from_slice(&length.to_ne_bytes());
            }
            prop_assert!(pieces(&control).count() <= control.len() / HEAD + 1);
        }
    }

    #[test]
    fn a_message_of_another_length_is_refused() {
        let control = message(LEVEL_SOCKET, DEVICE, &[0; BODY - 1]);
        assert_eq!(pieces(&control).next(), Some(Err(Malformed)));
        let mut long = Piece::Linear(1).encode();
        long[0] += 8;
        assert_eq!(pieces(&long).next(), Some(Err(Malformed)));
    }
}
