//! Messages that set up the channels of a connection: after the handshake, inside the session, before the first frame. Pure:
//! bytes in, messages out. Every length is checked before it is used or allocated.
//!
//! A message is a header (`envelope`) and its payload; numbers are little-endian.

use super::envelope::{Envelope, Opened, Reader};
use super::hello::MAX_CHANNELS;
use super::join::Join;
use super::text;
use crate::addresses::plain;
use crate::status::{bail, Error, ErrorKind, Result, StatusCode, UCCL_OK};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const ENVELOPE: Envelope = Envelope { name: "set-up message", magic: 0xC8, limit: payload_limit };
/// Bytes of a plugin's connect handle.
pub(crate) const HANDLE_BYTES: usize = nccl_net_abi::NCCL_NET_HANDLE_MAXSIZE;
/// Most sets of channels of a connection.
pub(crate) const MAX_SETS: usize = 16;
/// Most channels of all sets together.
pub(crate) const MAX_ALL: usize = 3 * MAX_CHANNELS as usize;
/// All channel numbers are below this.
const NUMBERS: usize = MAX_SETS * MAX_CHANNELS as usize;
const MAX_NIC: usize = 31;
/// Most addresses of an engine that an offer names.
pub(crate) const MAX_ADDRESSES: usize = 8;
/// Most bytes of a text.
pub(crate) const MAX_TEXT: usize = 512;

/// A plugin's connect handle.
pub(crate) type Handle = [u8; HANDLE_BYTES];

/// One listen comm of the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    /// Name of the NIC that it listens on, 1 to 31 printable characters.
    pub nic: String,
    /// Its connect handle.
    pub handle: Handle,
}

/// Where an engine waits for a peer on the same host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Invitation {
    /// Identifies the running host and reveals nothing else.
    pub host: [u8; 16],
    /// Names the listener's Unix socket.
    pub name: [u8; 16],
}

/// An engine's verdict on its part of the set-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// `UCCL_OK`, or the negative number of an error.
    pub status: StatusCode,
    /// The reason, for people; printable.
    pub text: String,
}

impl Verdict {
    /// The verdict of success.
    pub(crate) fn ok() -> Verdict {
        Verdict { status: UCCL_OK, text: String::new() }
    }

    /// The result that the receiver of the verdict reports.
    pub(crate) fn result(&self) -> Result<()> {
        match self.status {
            UCCL_OK => Ok(()),
            code => {
                let kind = match ErrorKind::from_code(code) {
                    // The cancellation happened at the peer, not here.
                    ErrorKind::Canceled => ErrorKind::RemoteDisconnect,
                    kind => kind,
                };
                Err(Error::new(kind, format_args!("refused by the peer: {}", self.text)))
            }
        }
    }
}

impl From<&Error> for Verdict {
    fn from(error: &Error) -> Verdict {
        Verdict { status: error.code(), text: text::printable(&error.to_string(), MAX_TEXT) }
    }
}

/// A message of the set-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The listen comms of the sender, by plugin set, where it waits for a peer on the same host, where a peer on another host reaches it,
    /// and the connection that the set-up joins.
    Offer(Vec<Vec<Offered>>, Option<Invitation>, Vec<SocketAddr>, Option<Join>),
    /// The sender's part is done. With status OK: the numbers of the channels that are up at the sender, rising (64 times the
    /// number of the set plus the position in the set's offer), and whether it has met the peer on this host. The sender's last
    /// message.
    Ready(Verdict, Vec<u16>, bool),
    /// The sender ends the set-up. Its last message.
    Abort(Verdict),
}

const T_OFFER: u8 = 1;
const T_READY: u8 = 2;
const T_ABORT: u8 = 3;

/// The largest payload of a message type; `None` for an unknown type.
fn payload_limit(kind: u8) -> Option<usize> {
    Some(match kind {
        T_OFFER => {
            1 + MAX_SETS * 2
                + MAX_ALL * (1 + MAX_NIC + HANDLE_BYTES)
                + 1
                + 32
                + 1
                + MAX_ADDRESSES * 18
                + 1
                + 16
                + 4
                + 2
                + 2 * MAX_ALL
                + 1
                + 8
                + 32
        }
        T_READY => 4 + 2 + MAX_TEXT + 2 + 2 * MAX_ALL + 1,
        T_ABORT => 4 + 2 + MAX_TEXT,
        _ => return None,
    })
}

/// What [`decode`] found at the front of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// A message and its number of bytes.
    Message(Message, usize),
    /// More bytes are needed: the size of the whole message, or at least of the header.
    Need(usize),
}

/// Decodes the message at the front of `buf`.
///
/// # Errors
/// `Protocol` when the bytes can never become a message.
pub(crate) fn decode(buf: &[u8]) -> Result<Decoded> {
    let (kind, mut reader, total) = match ENVELOPE.open(buf)? {
        Opened::Payload(kind, reader, total) => (kind, reader, total),
        Opened::Need(n) => return Ok(Decoded::Need(n)),
    };
    let message = match kind {
        T_OFFER => offer(&mut reader)?,
        T_READY => {
            let verdict = verdict(&mut reader)?;
            Message::Ready(verdict, channels(&mut reader)?, flag(&mut reader)?)
        }
        _ => match verdict(&mut reader)? {
            Verdict { status: UCCL_OK, .. } => bail!(Protocol, "a set-up was aborted without a reason"),
            verdict => Message::Abort(verdict),
        },
    };
    ENVELOPE.end(kind, &reader)?;
    Ok(Decoded::Message(message, total))
}

fn offer(reader: &mut Reader<'_>) -> Result<Message> {
    let [sets] = reader.fixed()?;
    if usize::from(sets) > MAX_SETS {
        bail!(Protocol, "an offer of {sets} plugin sets");
    }
    let mut all = 0;
    let sets = (0..sets).map(|_| {
        let n = reader.u16()?;
        all += usize::from(n);
        if n > MAX_CHANNELS || all > MAX_ALL {
            bail!(Protocol, "an offer of {n} channels");
        }
        (0..n).map(|_| offered(reader)).collect::<Result<Vec<_>>>()
    });
    let sets = sets.collect::<Result<_>>()?;
    let invitation = match flag(reader)? {
        true => Some(Invitation { host: reader.fixed()?, name: reader.fixed()? }),
        false => None,
    };
    let addresses = addresses(reader)?;
    let join = match flag(reader)? {
        true => Some(Join {
            connection: reader.fixed()?,
            number: reader.u32()?,
            channels: channels(reader)?,
            opened: match flag(reader)? {
                true => Some(reader.u64()?),
                false => None,
            },
            proof: reader.fixed()?,
        }),
        false => None,
    };
    Ok(Message::Offer(sets, invitation, addresses, join))
}

fn addresses(reader: &mut Reader<'_>) -> Result<Vec<SocketAddr>> {
    let [n] = reader.fixed()?;
    if usize::from(n) > MAX_ADDRESSES {
        bail!(Protocol, "an offer names {n} addresses");
    }
    let address = |_| Ok(SocketAddr::new(plain(Ipv6Addr::from(reader.fixed::<16>()?).into()), reader.u16()?));
    (0..n).map(address).collect()
}

fn flag(reader: &mut Reader<'_>) -> Result<bool> {
    match reader.fixed()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => bail!(Protocol, "a flag of a set-up message is {other}, expected 0 or 1"),
    }
}

fn offered(reader: &mut Reader<'_>) -> Result<Offered> {
    let [len] = reader.fixed()?;
    let nic = text::checked(reader.bytes(len.into())?, MAX_NIC, "a NIC's name")?;
    if nic.is_empty() {
        bail!(Protocol, "an offer names a NIC without a name");
    }
    Ok(Offered { nic: nic.to_owned(), handle: reader.fixed()? })
}

fn verdict(reader: &mut Reader<'_>) -> Result<Verdict> {
    let status = StatusCode::from_le_bytes(reader.fixed()?);
    if status > UCCL_OK {
        bail!(Protocol, "a verdict of status {status}");
    }
    let len = reader.u16()?;
    let text = text::checked(reader.bytes(len.into())?, MAX_TEXT, "a verdict's text")?;
    Ok(Verdict { status, text: text.to_owned() })
}

fn channels(reader: &mut Reader<'_>) -> Result<Vec<u16>> {
    let n = reader.u16()?;
    if usize::from(n) > MAX_ALL {
        bail!(Protocol, "a message lists {n} channels");
    }
    let up = (0..n).map(|_| reader.u16()).collect::<Result<Vec<_>>>()?;
    if up.last().is_some_and(|&last| usize::from(last) >= NUMBERS) || up.windows(2).any(|w| w[0] >= w[1]) {
        bail!(Protocol, "the numbers of channels are not in rising order");
    }
    Ok(up)
}

fn put_verdict(verdict: &Verdict, out: &mut Vec<u8>) {
    let text = text::printable(&verdict.text, MAX_TEXT);
    out.extend_from_slice(&verdict.status.to_le_bytes());
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_channels(numbers: &[u16], out: &mut Vec<u8>) {
    out.extend_from_slice(&(numbers.len() as u16).to_le_bytes());
    numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
}

/// Appends `message` to `out`. Texts and names are escaped and cut to their limits. The caller must keep counts within the
/// limits.
pub(crate) fn encode(message: &Message, out: &mut Vec<u8>) {
    ENVELOPE.seal(out, |out| match message {
        Message::Offer(sets, invitation, addresses, join) => {
            out.push(sets.len() as u8);
            for set in sets {
                out.extend_from_slice(&(set.len() as u16).to_le_bytes());
                for offered in set {
                    let nic = text::printable(&offered.nic, MAX_NIC);
                    out.push(nic.len() as u8);
                    out.extend_from_slice(nic.as_bytes());
                    out.extend_from_slice(&offered.handle);
                }
            }
            out.push(u8::from(invitation.is_some()));
            if let Some(Invitation { host, name }) = invitation {
                out.extend_from_slice(host);
                out.extend_from_slice(name);
            }
            out.push(addresses.len() as u8);
            for address in addresses {
                let ip = match address.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                out.extend_from_slice(&ip.octets());
                out.extend_from_slice(&address.port().to_le_bytes());
            }
            out.push(u8::from(join.is_some()));
            if let Some(Join { connection, number, channels, opened, proof }) = join {
                out.extend_from_slice(connection);
                out.extend_from_slice(&number.to_le_bytes());
                put_channels(channels, out);
                out.push(u8::from(opened.is_some()));
                opened.iter().for_each(|opened| out.extend_from_slice(&opened.to_le_bytes()));
                out.extend_from_slice(proof);
            }
            T_OFFER
        }
        Message::Ready(verdict, up, local) => {
            put_verdict(verdict, out);
            put_channels(up, out);
            out.push(u8::from(*local));
            T_READY
        }
        Message::Abort(verdict) => {
            put_verdict(verdict, out);
            T_ABORT
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::envelope::HEADER_BYTES;
    use super::*;
    use proptest::prelude::*;

    fn offers() -> impl Strategy<Value = Vec<Vec<Offered>>> {
        let offered = ("[ -~]{1,31}", any::<u8>()).prop_map(|(nic, b)| Offered { nic, handle: [b; HANDLE_BYTES] });
        proptest::collection::vec(proptest::collection::vec(offered, 0..6), 1..=MAX_SETS)
    }

    proptest! {
        #[test]
        fn every_message_round_trips(offer in offers(), status in i32::MIN..0, text in "[ -~]{0,200}", up in proptest::collection::btree_set(0u16..NUMBERS as u16, 0..64)) {
            let up: Vec<u16> = up.into_iter().collect();
            let verdict = Verdict { status, text };
            let invitation = (status % 2 == 0).then_some(Invitation { host: [1; 16], name: [2; 16] });
            let join = (status % 3 == 0).then(|| Join { connection: [3; 16], number: status.unsigned_abs(), channels: up.clone(), opened: (status % 2 == 0).then_some(7), proof: [4; 32] });
            let addresses = vec!["10.0.0.1:7".parse().unwrap(), "[fd00::1]:65535".parse().unwrap()];
            let all = [Message::Offer(offer, invitation, addresses, join), Message::Ready(Verdict::ok(), up, true), Message::Ready(verdict.clone(), Vec::new(), false), Message::Abort(verdict)];
            let mut buf = Vec::new();
            all.iter().for_each(|m| encode(m, &mut buf));
            let mut at = 0;
            for message in &all {
                match decode(&buf[at..]).unwrap() {
                    Decoded::Message(got, n) => {
                        prop_assert_eq!(&got, message);
                        // Every proper prefix asks for more and never fails.
                        for cut in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, n / 2, n - 1] {
                            if cut < n {
                                let more = matches!(decode(&buf[at..at + cut]).unwrap(), Decoded::Need(need) if need > cut);
                                prop_assert!(more);
                            }
                        }
                        at += n;
                    }
                    Decoded::Need(_) => prop_assert!(false, "incomplete"),
                }
            }
            prop_assert_eq!(at, buf.len());
        }

        #[test]
        fn a_damaged_message_never_panics(kind in 0u8..=4, payload in proptest::collection::vec(any::<u8>(), 0..400), random in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut buf = (payload.len() as u32).to_le_bytes().to_vec();
            buf.extend_from_slice(&[kind, ENVELOPE.magic, 0, 0]);
            buf.extend_from_slice(&payload);
            let _ = decode(&buf);
            let _ = decode(&random);
        }
    }

    #[test]
    fn the_largest_messages_fit_their_limits() {
        let offered = Offered { nic: "n".repeat(40), handle: [1; HANDLE_BYTES] };
        let verdict = Verdict { status: -1, text: "t".repeat(4096) };
        for message in [
            Message::Offer(
                (0..MAX_SETS).map(|set| vec![offered.clone(); if set < 3 { MAX_CHANNELS.into() } else { 0 }]).collect(),
                Some(Invitation { host: [1; 16], name: [2; 16] }),
                vec!["[fd00::1]:65535".parse().unwrap(); MAX_ADDRESSES],
                Some(Join {
                    connection: [3; 16],
                    number: 1,
                    channels: (0..MAX_ALL as u16).collect(),
                    opened: Some(1),
                    proof: [4; 32],
                }),
            ),
            Message::Ready(verdict.clone(), (0..MAX_ALL as u16).map(|i| i + 7).collect(), true),
            Message::Abort(verdict),
        ] {
            let mut buf = Vec::new();
            encode(&message, &mut buf);
            assert_eq!(Some(buf.len() - HEADER_BYTES), payload_limit(buf[4]));
            assert!(matches!(decode(&buf), Ok(Decoded::Message(..))));
        }
    }

    #[test]
    fn more_channels_than_all_sets_may_have_are_refused() {
        let offered = Offered { nic: "n".into(), handle: [1; HANDLE_BYTES] };
        let mut buf = Vec::new();
        encode(&Message::Offer(vec![vec![offered; 50]; 4], None, Vec::new(), None), &mut buf);
        assert!(decode(&buf).is_err());
    }

    #[test]
    fn lengths_over_the_limit_are_refused_from_the_header_alone() {
        for kind in 0..=255u8 {
            let mut header = u32::MAX.to_le_bytes().to_vec();
            header.extend_from_slice(&[kind, ENVELOPE.magic, 0, 0]);
            assert!(decode(&header).is_err(), "type {kind}");
        }
    }

    /// A message of `kind` with this payload.
    fn raw(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut buf = (payload.len() as u32).to_le_bytes().to_vec();
        buf.extend_from_slice(&[kind, ENVELOPE.magic, 0, 0]);
        buf.extend_from_slice(payload);
        buf
    }

    #[test]
    fn contents_out_of_range_are_refused() {
        let bad: [(&str, u8, &[u8]); 18] = [
            ("nothing at all", T_OFFER, &[]),
            ("too many sets", T_OFFER, &[&[17][..], &[0; 34]].concat()),
            ("too many channels", T_OFFER, &[1, 65, 0]),
            ("a NIC without a name", T_OFFER, &[&[1, 1, 0, 0][..], &[0; HANDLE_BYTES]].concat()),
            ("a NIC's name with an escape", T_OFFER, &[&[1, 1, 0, 1, 27][..], &[0; HANDLE_BYTES]].concat()),
            ("a positive status", T_ABORT, &[1, 0, 0, 0, 0, 0]),
            ("aborted with OK", T_ABORT, &[0, 0, 0, 0, 0, 0]),
            ("a newline in a text", T_ABORT, &[255, 255, 255, 255, 1, 0, b'\n']),
            ("a channel twice", T_READY, &[0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 1, 0]),
            ("neither met nor not", T_READY, &[0, 0, 0, 0, 0, 0, 0, 0, 2]),
            ("neither invited nor not", T_OFFER, &[1, 0, 0, 2]),
            ("half an invitation", T_OFFER, &[&[1, 0, 0, 1][..], &[0; 31]].concat()),
            ("too many addresses", T_OFFER, &[&[1, 0, 0, 0, 9][..], &[0; 9 * 18 + 1]].concat()),
            ("half an address", T_OFFER, &[&[1, 0, 0, 0, 1][..], &[0; 17]].concat()),
            ("neither joining nor not", T_OFFER, &[1, 0, 0, 0, 0, 2]),
            ("half a join", T_OFFER, &[&[1, 0, 0, 0, 0, 1][..], &[0; 54]].concat()),
            ("a join of a channel twice", T_OFFER, &[&[1, 0, 0, 0, 0, 1][..], &[0; 20], &[2, 0, 1, 0, 1, 0], &[0; 33]].concat()),
            ("a channel beyond all", T_READY, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 4]),
        ];
        for (what, kind, payload) in bad {
            assert_eq!(decode(&raw(kind, payload)).unwrap_err().kind(), ErrorKind::Protocol, "{what}");
        }
    }

    #[test]
    fn errors_cross_as_verdicts() {
        let error = crate::status::err!(Plugin, "eth1 \u{1b}[31m refused");
        let mut buf = Vec::new();
        encode(&Message::Abort(Verdict::from(&error)), &mut buf);
        let Decoded::Message(Message::Abort(verdict), _) = decode(&buf).unwrap() else { panic!("not an abort") };
        let got = verdict.result().unwrap_err();
        assert_eq!((got.kind(), got.to_string().as_str()), (ErrorKind::Plugin, "refused by the peer: eth1 \\u{1b}[31m refused"));
        assert_eq!(Verdict::ok().result(), Ok(()));
        let canceled = Verdict::from(&crate::status::err!(Canceled, "the engine is being destroyed"));
        assert_eq!(canceled.result().unwrap_err().kind(), ErrorKind::RemoteDisconnect, "it was not canceled here");
    }
}
