//! The bytes of steering rules, as the ioctl of ethtool takes them. No system calls.

use std::net::SocketAddrV4;

const INSERT: u32 = 0x32;
const DELETE: u32 = 0x31;
const COUNT: u32 = 0x2e;
const GET: u32 = 0x2f;
const ALL: u32 = 0x30;
const TCP_V4: u32 = 1;
/// The driver chooses a place.
const ANYWHERE: u32 = 0xffff_ffff;
/// In the size of the table: the driver can.
const CAN_CHOOSE: u32 = 0x8000_0000;
const FLOW_TYPE: usize = 16;
const WANTED: usize = 20;
const MASK: usize = 92;
const QUEUE: usize = 168;
const PLACE: usize = 176;
const RULES: usize = 184;
const PLACES: usize = 188;
const DATA: usize = 8;

/// Bytes of a request without a list of places.
pub const RULE_BYTES: usize = 192;

/// The packets of one TCP connection, as the receiver sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The peer's end.
    pub from: SocketAddrV4,
    /// This end.
    pub to: SocketAddrV4,
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn get(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Steers a connection to a queue, by a rule in this place.
pub(crate) fn insert(flow: &Flow, queue: u32, place: u32) -> [u8; RULE_BYTES] {
    let mut bytes = [0; RULE_BYTES];
    put(&mut bytes, 0, &INSERT.to_ne_bytes());
    put(&mut bytes, FLOW_TYPE, &TCP_V4.to_ne_bytes());
    put(&mut bytes, WANTED, &flow.from.ip().octets());
    put(&mut bytes, WANTED + 4, &flow.to.ip().octets());
    put(&mut bytes, WANTED + 8, &flow.from.port().to_be_bytes());
    put(&mut bytes, WANTED + 10, &flow.to.port().to_be_bytes());
    put(&mut bytes, MASK, &[0xff; 12]);
    put(&mut bytes, QUEUE, &u64::from(queue).to_ne_bytes());
    put(&mut bytes, PLACE, &place.to_ne_bytes());
    bytes
}

/// The place that the driver has given a rule.
pub(crate) fn place(inserted: &[u8; RULE_BYTES]) -> u32 {
    get(inserted, PLACE)
}

/// Deletes the rule in this place.
pub(crate) fn delete(place: u32) -> [u8; RULE_BYTES] {
    let mut bytes = [0; RULE_BYTES];
    put(&mut bytes, 0, &DELETE.to_ne_bytes());
    put(&mut bytes, PLACE, &place.to_ne_bytes());
    bytes
}

/// Asks for the rule in this place.
pub(crate) fn get_rule(place: u32) -> [u8; RULE_BYTES] {
    let mut bytes = delete(place);
    put(&mut bytes, 0, &GET.to_ne_bytes());
    bytes
}

/// The queue of a rule in an answer to `get_rule`.
pub(crate) fn queue_of(answer: &[u8]) -> u64 {
    u64::from(get(answer, QUEUE)) | u64::from(get(answer, QUEUE + 4)) << 32
}

/// The places of rules in an answer to `all`.
pub(crate) fn places(all: &[u8]) -> Vec<u32> {
    (0..get(all, RULES) as usize).map(|i| PLACES + i * 4).take_while(|at| at + 4 <= all.len()).map(|at| get(all, at)).collect()
}

/// For how many rules there is room, if the driver says so; 0 otherwise.
pub(crate) fn room(counted: &[u8], all: &[u8]) -> u32 {
    let size = get(counted, DATA) & !CAN_CHOOSE;
    if size == 0 {
        get(all, DATA)
    } else {
        size
    }
}

/// Asks how many rules there are, and for how many there is room.
pub(crate) fn count() -> [u8; RULE_BYTES] {
    let mut bytes = [0; RULE_BYTES];
    put(&mut bytes, 0, &COUNT.to_ne_bytes());
    bytes
}

/// Asks for the places of so many rules.
pub(crate) fn all(rules: u32) -> Vec<u8> {
    let mut bytes = vec![0; RULE_BYTES + rules as usize * 4];
    put(&mut bytes, 0, &ALL.to_ne_bytes());
    put(&mut bytes, RULES, &rules.to_ne_bytes());
    bytes
}

/// Rules in an answer to `count`.
pub(crate) fn counted(answer: &[u8]) -> u32 {
    get(answer, RULES)
}

/// The place for a new rule: any, if the driver chooses; otherwise the last free one.
pub(crate) fn free(counted: &[u8], all: &[u8]) -> Option<u32> {
    if get(counted, DATA) & CAN_CHOOSE != 0 {
        return Some(ANYWHERE);
    }
    let taken = places(all);
    (0..room(counted, all).min(1 << 16)).rev().find(|place| !taken.contains(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_rule_names_both_ends() {
        let flow = Flow { from: "10.1.2.3:4660".parse().unwrap(), to: "10.9.8.7:22136".parse().unwrap() };
        let bytes = insert(&flow, 3, 31);
        assert_eq!(bytes[..4], INSERT.to_ne_bytes());
        assert_eq!(bytes[20..32], [10, 1, 2, 3, 10, 9, 8, 7, 0x12, 0x34, 0x56, 0x78]);
        assert_eq!(bytes[92..104], [0xff; 12]);
        assert_eq!((bytes[32..92].iter().all(|b| *b == 0), bytes[104..168].iter().all(|b| *b == 0)), (true, true));
        assert_eq!((bytes[168], place(&bytes), get(&delete(31), PLACE)), (3, 31, 31));
        assert_eq!((queue_of(&bytes), queue_of(&insert(&flow, u32::MAX, 0))), (3, u64::from(u32::MAX)));
        assert_eq!(get_rule(9)[4..], delete(9)[4..]);
    }

    fn counted_of(rules: u32, size: u32) -> Vec<u8> {
        let mut bytes = count().to_vec();
        put(&mut bytes, RULES, &rules.to_ne_bytes());
        put(&mut bytes, DATA, &size.to_ne_bytes());
        bytes
    }

    fn all_of(taken: &[u32]) -> Vec<u8> {
        let mut bytes = all(taken.len() as u32);
        for (i, place) in taken.iter().enumerate() {
            put(&mut bytes, PLACES + i * 4, &place.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn a_driver_that_chooses_is_let_choose() {
        assert_eq!(free(&counted_of(0, CAN_CHOOSE | 8), &all_of(&[])), Some(ANYWHERE));
        assert_eq!((counted(&counted_of(7, 8)), free(&counted_of(0, 0), &all_of(&[]))), (7, None));
    }

    proptest! {
        #[test]
        fn a_free_place_is_found(taken in proptest::collection::btree_set(0..32u32, 0..33)) {
            let taken: Vec<u32> = taken.into_iter().collect();
            let found = free(&counted_of(taken.len() as u32, 32), &all_of(&taken));
            prop_assert_eq!(found, (0..32).rev().find(|place| !taken.contains(place)));
        }

        #[test]
        fn any_answer_is_read(counted in proptest::collection::vec(any::<u8>(), 0..200), all in proptest::collection::vec(any::<u8>(), 0..300)) {
            // The kernel's count is bounded by the length that was asked for.
            let mut all = all;
            if all.len() >= PLACES {
                put(&mut all, RULES, &1000u32.to_ne_bytes());
            }
            let _ = free(&counted, &all);
        }
    }
}
