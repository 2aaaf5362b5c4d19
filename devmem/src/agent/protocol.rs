//! The messages between a process and the agent: one request, one answer, each a whole datagram. No system calls.

const MAGIC: u32 = u32::from_le_bytes(*b"UDM1");
const NAME: usize = 16;
/// Bytes of a request.
pub const REQUEST_BYTES: usize = 12 + NAME;
/// Most bytes of an answer.
pub const ANSWER_BYTES: usize = 256;
const ANSWER_HEAD: usize = 20;

/// What a process asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Bind the dma-buf that comes with it to a spare queue of this NIC. Once on a connection to the agent.
    Bind(String),
    /// Steer the TCP connection that comes with it to the bound queue.
    Steer,
    /// Delete the rule with this number.
    Release(u32),
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done: the queue and the binding of a `Bind`, the number of the rule of a `Steer`.
    Done(u32, u32),
    /// Refused: the error's number, and a text if there is one.
    Refused(i32, Option<String>),
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl Request {
    /// Its bytes.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (kind, number, name) = match self {
            Request::Bind(nic) => (1u32, 0, nic.as_str()),
            Request::Steer => (2, 0, ""),
            Request::Release(number) => (3, *number, ""),
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&number.to_le_bytes());
        let len = name.len().min(NAME - 1);
        bytes[12..12 + len].copy_from_slice(&name.as_bytes()[..len]);
        bytes
    }

    /// The request in exactly these bytes.
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        if bytes.len() != REQUEST_BYTES || word(bytes, 0) != Some(MAGIC) {
            return None;
        }
        let (number, name) = (word(bytes, 8)?, &bytes[12..]);
        let len = name.iter().position(|byte| *byte == 0)?;
        if name[len..].iter().any(|byte| *byte != 0) {
            return None;
        }
        match (word(bytes, 4)?, number, len) {
            (1, 0, 1..) if name[..len].iter().all(|byte| byte.is_ascii_graphic() && *byte != b'/') => {
                Some(Request::Bind(String::from_utf8(name[..len].to_vec()).ok()?))
            }
            (2, 0, 0) => Some(Request::Steer),
            (3, number, 0) => Some(Request::Release(number)),
            _ => None,
        }
    }
}

impl Answer {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (error, one, other, text) = match self {
            Answer::Done(one, other) => (0, *one, *other, ""),
            Answer::Refused(error, text) => (*error, 0, 0, text.as_deref().unwrap_or("")),
        };
        let len = (0..=text.len().min(ANSWER_BYTES - ANSWER_HEAD)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let mut bytes = Vec::with_capacity(ANSWER_HEAD + len);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(error.to_le_bytes());
        bytes.extend(one.to_le_bytes());
        bytes.extend(other.to_le_bytes());
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend(&text.as_bytes()[..len]);
        bytes
    }

    /// The answer in exactly these bytes.
    pub fn decode(bytes: &[u8]) -> Option<Answer> {
        let (magic, error) = (word(bytes, 0)?, word(bytes, 4)? as i32);
        let (one, other, len) = (word(bytes, 8)?, word(bytes, 12)?, word(bytes, 16)? as usize);
        let text = bytes.get(ANSWER_HEAD..)?;
        if magic != MAGIC || text.len() != len {
            return None;
        }
        let text = (len > 0).then(|| String::from_utf8_lossy(text).into_owned());
        match error {
            0 if text.is_none() => Some(Answer::Done(one, other)),
            1.. => Some(Answer::Refused(error, text)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_are_read_as_they_were_written(nic in "[a-z0-9]{1,15}", number in any::<u32>(), other in any::<u32>(), error in 1..200i32, text in "[a-zß ]{0,300}") {
            for request in [Request::Bind(nic), Request::Steer, Request::Release(number)] {
                prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            }
            let done = Answer::Done(number, other);
            prop_assert_eq!(Answer::decode(&done.encode()), Some(done));
            let bytes = Answer::Refused(error, Some(text.clone())).encode();
            prop_assert!(bytes.len() <= ANSWER_BYTES);
            let Some(Answer::Refused(found, cut)) = Answer::decode(&bytes) else { panic!("{bytes:?}") };
            prop_assert!(found == error && text.starts_with(&cut.unwrap_or_default()));
        }

        #[test]
        fn any_bytes_are_a_message_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0usize..REQUEST_BYTES, bit in 0u8..8) {
            let _ = (Request::decode(&bytes), Answer::decode(&bytes));
            let mut near = Request::Bind("eth0".into()).encode();
            near[at] ^= 1 << bit;
            if let Some(Request::Bind(nic)) = Request::decode(&near) {
                prop_assert!(!nic.is_empty() && nic.len() < NAME && !nic.contains('/'));
            }
        }
    }
}
