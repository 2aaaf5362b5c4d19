//! Ties a channel to its control connection: a key that its first bytes prove, and the protection of its messages. Knows nothing
//! of the origin of keys.

use crate::status::Result;
use process::guarded::Guarded;

/// 32 secret bytes.
pub(crate) type Secret = Guarded<[u8; 32]>;

/// How the messages of a comm are protected.
pub(crate) enum Guard {
    /// No protection.
    None,
    /// A checksum, against damage.
    Checksum,
    /// AES-256-GCM under this key, which belongs to one direction of one channel.
    Seal(Secret),
}

/// The keys of one direction of a channel.
pub(crate) struct HalfKeys {
    /// The key that the connector proves in its first bytes.
    pub hello: Secret,
    /// The protection of the messages.
    pub guard: Guard,
}

impl HalfKeys {
    /// The key to prove, if there is one, and the guard.
    pub(crate) fn parts(keys: Option<HalfKeys>) -> (Option<Secret>, Guard) {
        keys.map_or((None, Guard::None), |keys| (Some(keys.hello), keys.guard))
    }
}

/// Both directions of a channel.
pub(crate) struct ChannelKeys {
    /// Towards the peer.
    pub send: HalfKeys,
    /// From the peer.
    pub recv: HalfKeys,
}

/// The keys of a channel by its number.
pub(crate) type KeysOf<'a> = &'a dyn Fn(usize) -> Result<ChannelKeys>;
