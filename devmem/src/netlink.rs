//! Messages of generic netlink: requests, and what is answered. No system calls.

const HEAD: usize = 16;
const GENERIC: usize = 4;
const ERROR: u16 = 2;
const REQUEST_WITH_ACK: u16 = 1 | 4;
const CAPPED: u16 = 0x100;
const WITH_ATTRIBUTES: u16 = 0x200;
const ERROR_TEXT: u16 = 1;
const NESTED: u16 = 0x8000;
const KIND: u16 = 0x3fff;

/// A request in the making.
#[derive(Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A command of a family.
    pub fn new(family: u16, command: u8, version: u8, sequence: u32) -> Request {
        let mut bytes = vec![0; HEAD + GENERIC];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&REQUEST_WITH_ACK.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes[HEAD] = command;
        bytes[HEAD + 1] = version;
        Request { bytes }
    }

    /// With a number.
    pub fn number(self, kind: u16, value: u32) -> Request {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// With a number of one byte.
    pub fn byte(self, kind: u16, value: u8) -> Request {
        self.attribute(kind, &[value])
    }

    /// With a name, which ends in a zero byte.
    pub fn text(self, kind: u16, value: &str) -> Request {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// With numbers inside of an attribute.
    pub fn nested(self, kind: u16, numbers: &[(u16, u32)]) -> Request {
        let inner = numbers.iter().fold(Request { bytes: Vec::new() }, |inner, (kind, value)| inner.number(*kind, *value));
        self.attribute(kind | NESTED, &inner.bytes)
    }

    /// The message.
    pub fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Request {
        // Names and numbers of ours are short.
        self.bytes.extend((4 + value.len() as u16).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }
}

/// Attributes of a message: kind and value. Ends at the first that does not lie within the bytes.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The first of a kind.
    pub fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The first of a kind, as a number.
    pub fn number(self, kind: u16) -> Option<u32> {
        match self.find(kind)? {
            [value] => Some(u32::from(*value)),
            value if value.len() == 2 => Some(u32::from(u16::from_ne_bytes(value.try_into().ok()?))),
            value => Some(u32::from_ne_bytes(value.try_into().ok()?)),
        }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(short(self.rest, 0)?);
        let kind = short(self.rest, 2)? & KIND;
        let value = self.rest.get(4..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    }
}

/// How a request has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done; the attributes of the answer, if there was one.
    Done(Vec<u8>),
    /// Refused, with the kernel's text if it gave one.
    Refused(i32, Option<String>),
}

impl Outcome {
    /// A number of an answer.
    pub fn number(&self, kind: u16) -> Option<u32> {
        match self {
            Outcome::Done(bytes) => Attributes { rest: bytes }.number(kind),
            Outcome::Refused(..) => None,
        }
    }

    /// The bytes of an attribute of an answer.
    pub fn bytes(&self, kind: u16) -> Option<&[u8]> {
        match self {
            Outcome::Done(bytes) => Attributes { rest: bytes }.find(kind),
            Outcome::Refused(..) => None,
        }
    }
}

/// The answers to one request, datagram by datagram.
#[derive(Debug)]
pub struct Exchange {
    sequence: u32,
    answer: Vec<u8>,
}

impl Exchange {
    /// Of the request with this number.
    pub fn new(sequence: u32) -> Exchange {
        Exchange { sequence, answer: Vec::new() }
    }

    /// Reads a datagram. The outcome, once the kernel has acknowledged or refused the request; messages of other requests are passed over.
    pub fn read(&mut self, datagram: &[u8]) -> Option<Outcome> {
        let mut rest = datagram;
        while let Some(length) = long(rest, 0).map(|length| length as usize) {
            let message = rest.get(..length).filter(|message| message.len() >= HEAD)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            if long(message, 8)? != self.sequence {
                continue;
            }
            if short(message, 4)? == ERROR {
                return self.end(message);
            }
            self.answer = message.get(HEAD + GENERIC..)?.to_vec();
        }
        None
    }

    fn end(&mut self, message: &[u8]) -> Option<Outcome> {
        let (flags, error) = (short(message, 6)?, long(message, HEAD)? as i32);
        if error == 0 {
            return Some(Outcome::Done(std::mem::take(&mut self.answer)));
        }
        // The request follows, whole or only its head; then attributes.
        let request = if flags & CAPPED != 0 { HEAD } else { long(message, HEAD + 4)? as usize };
        let text = (flags & WITH_ATTRIBUTES != 0)
            .then(|| message.get((HEAD + 4).checked_add(request)?.next_multiple_of(4)..))
            .flatten()
            .and_then(|rest| Attributes { rest }.find(ERROR_TEXT))
            .map(|text| String::from_utf8_lossy(text.split(|byte| *byte == 0).next().unwrap_or(&[])).into_owned());
        Some(Outcome::Refused(error.saturating_neg(), text))
    }
}

fn short(bytes: &[u8], from: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(from..from + 2)?.try_into().ok()?))
}

fn long(bytes: &[u8], from: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(from..from + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Request::new(kind, 0, 0, sequence).bytes;
        bytes.truncate(HEAD);
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(body);
        let mut bytes = Request { bytes }.finish();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn refusal(request: &[u8], error: i32, capped: bool, text: &str) -> Vec<u8> {
        let mut body = (-error).to_ne_bytes().to_vec();
        body.extend(if capped { &request[..HEAD] } else { request });
        let body = Request { bytes: body }.text(ERROR_TEXT, text).bytes;
        message(ERROR, WITH_ATTRIBUTES | if capped { CAPPED } else { 0 }, 7, &body)
    }

    #[test]
    fn an_answer_and_its_acknowledgement() {
        let answer = Request::new(20, 13, 1, 7).number(3, 9).number(4, 55).finish();
        let done = message(ERROR, CAPPED, 7, &[0; 20]);
        let mut exchange = Exchange::new(7);
        assert_eq!(exchange.read(&message(20, 0, 6, &[0; 4])), None);
        assert_eq!(exchange.read(&answer), None);
        assert_eq!(exchange.read(&done).unwrap().number(4), Some(55));
        // Both in one datagram.
        assert_eq!(Exchange::new(7).read(&[answer, done].concat()).unwrap().number(4), Some(55));
    }

    #[test]
    fn a_nested_attribute_holds_its_numbers() {
        let bytes = Request::new(20, 13, 1, 7).number(1, 2).nested(2, &[(1, 3), (3, 0)]).finish();
        let mut all = Attributes { rest: &bytes[HEAD + GENERIC..] };
        assert_eq!(all.next(), Some((1, &2u32.to_ne_bytes()[..])));
        let (kind, inner) = all.next().unwrap();
        assert_eq!(
            (kind, Attributes { rest: inner }.number(1), Attributes { rest: inner }.number(3), all.next()),
            (2, Some(3), Some(0), None)
        );
    }

    proptest! {
        #[test]
        fn a_refusal_says_why(text in "[a-z -]{0,40}", error in 1..200i32, capped in any::<bool>(), name in "[a-z]{0,9}") {
            let request = Request::new(20, 13, 1, 7).text(1, &name).finish();
            let refused = refusal(&request, error, capped, &text);
            prop_assert_eq!(Exchange::new(7).read(&refused), Some(Outcome::Refused(error, Some(text))));
        }

        #[test]
        fn any_bytes_are_read(datagram in proptest::collection::vec(any::<u8>(), 0..120), flags in any::<u16>(), kind in 0..4u16) {
            let mut exchange = Exchange::new(7);
            let _ = exchange.read(&datagram);
            if let Some(Outcome::Done(bytes)) = exchange.read(&message(kind, flags, 7, &datagram)) {
                Attributes { rest: &bytes }.for_each(drop);
            }
            let count = Attributes { rest: &datagram }.count();
            prop_assert!(count <= datagram.len() / 4);
        }
    }
}
