//! The messages between tcpx-perf's client and server, sent as notifications of the connection under test: JSON requests and
//! replies, and raw bytes to echo. Only formats and names.

use crate::api::FifoItem;
use crate::memory::Kind;
use crate::pattern::{Shape, Side};
use serde::{Deserialize, Serialize};

/// Version of this protocol; client and server must use the same.
pub const PROTOCOL: u32 = 1;

const REQUEST: &str = "tcpx-perf";
const ECHO: &str = "tcpx-perf-echo";

/// The purpose of a notification, encoded in its name. Notifications belong to an engine, not to a connection; so the server
/// gives each connection a number (in [`Reply::Welcome`]) that the client puts into the name of everything it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// JSON: a [`Request`] from the client with this number, or (number 0) a [`Reply`].
    Control(u64),
    /// Bytes to echo, or echoed bytes.
    Echo(u64),
}

impl Channel {
    /// The name of this channel's notifications.
    pub fn name(self) -> Vec<u8> {
        match self {
            Channel::Control(n) => format!("{REQUEST}:{n}"),
            Channel::Echo(n) => format!("{ECHO}:{n}"),
        }
        .into_bytes()
    }

    /// The channel with this name; `None` for another program's notification.
    pub fn parse(name: &[u8]) -> Option<Channel> {
        let (kind, number) = std::str::from_utf8(name).ok()?.split_once(':')?;
        let number = number.parse().ok()?;
        match kind {
            REQUEST => Some(Channel::Control(number)),
            ECHO => Some(Channel::Echo(number)),
            _ => None,
        }
    }
}

/// From client to server. Each is answered by one [`Reply`], except `Alive` and `Bye`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Allocate and register a buffer under this number. Reply: `Opened`.
    Open {
        /// Number of the buffer, chosen by the client.
        buffer: u32,
        /// Bytes.
        bytes: u64,
    },
    /// Fill the buffer with the pattern of a seed. Reply: `Done`.
    Fill {
        /// Number of the buffer.
        buffer: u32,
        /// Seed of the pattern.
        seed: u64,
    },
    /// Overwrite the buffer, so that stale data cannot pass for received data. Reply: `Done`.
    Poison {
        /// Number of the buffer.
        buffer: u32,
    },
    /// Compare the buffer with the expected result of a transfer. Reply: `Checked`.
    Check {
        /// Number of the buffer.
        buffer: u32,
        /// Seed of the source's pattern.
        seed: u64,
        /// How blocks were moved.
        shape: Shape,
        /// Which side of the shape this buffer is.
        side: Side,
    },
    /// Take part in two-sided messages. Reply: `Done` when ready, and `Done` again when all messages have passed.
    Exchange {
        /// Buffer that receives.
        receive: Option<u32>,
        /// Buffer that sends.
        send: Option<u32>,
        /// Length of a message, and the number in flight.
        shape: Shape,
        /// Messages in each direction.
        messages: u64,
    },
    /// Deregister and free the buffer. Reply: `Done`.
    Close {
        /// Number of the buffer.
        buffer: u32,
    },
    /// The client is alive.
    Alive,
    /// The client is done.
    Bye,
}

/// From server to client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The first message of a connection.
    Welcome {
        /// [`PROTOCOL`] of the server.
        protocol: u32,
        /// Number of this client.
        client: u64,
        /// Kind of memory of the server's buffers.
        memory: Kind,
    },
    /// The buffer is allocated and registered.
    Opened {
        /// Address of its first byte.
        addr: u64,
        /// FIFO item, hexadecimal.
        item: String,
    },
    /// Done.
    Done,
    /// The buffer was compared.
    Checked {
        /// Correct bytes.
        bytes: u64,
        /// The first difference.
        mismatch: Option<String>,
    },
    /// The request failed.
    Failed {
        /// The reason.
        message: String,
    },
    /// The server is alive and busy.
    Alive,
}

/// A FIFO item as text.
pub fn item_to_hex(item: &FifoItem) -> String {
    item.to_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

/// A FIFO item from its text.
pub fn item_from_hex(text: &str) -> Option<FifoItem> {
    let mut bytes = [0; 64];
    if text.len() != 2 * bytes.len() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(FifoItem::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_foreign_names_are_ignored() {
        for channel in [Channel::Control(0), Channel::Control(7), Channel::Echo(u64::MAX)] {
            assert_eq!(Channel::parse(&channel.name()), Some(channel));
        }
        for name in [&b""[..], b"agent", b"tcpx-perf", b"tcpx-perf:", b"tcpx-perf:x", b"other:1", b"\xff:1"] {
            assert_eq!(Channel::parse(name), None);
        }
    }

    #[test]
    fn items_round_trip() {
        let mut bytes = [0; 64];
        for (byte, i) in bytes.iter_mut().zip(100..) {
            *byte = i;
        }
        let text = item_to_hex(&FifoItem::from_bytes(&bytes));
        assert_eq!(item_from_hex(&text).unwrap().to_bytes(), bytes);
        for bad in [String::new(), text[..126].to_string(), text.replace('6', "g"), "é".repeat(64)] {
            assert!(item_from_hex(&bad).is_none());
        }
    }

    #[test]
    fn requests_round_trip() {
        let shape = Shape { total: 1 << 40, block: 4096, inflight: 2, order: Some(u64::MAX) };
        for request in [
            Request::Check { buffer: 1, seed: u64::MAX, shape, side: Side::Remote },
            Request::Exchange { receive: Some(1), send: None, shape, messages: 9 },
            Request::Bye,
        ] {
            let text = serde_json::to_vec(&request).unwrap();
            assert_eq!(serde_json::from_slice::<Request>(&text).unwrap(), request);
        }
    }
}
