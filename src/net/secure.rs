//! Ties a channel to its control connection: a key that its first bytes prove, and the protection of its messages. Knows nothing of
//! the origin of keys.

use crate::status::Result;
use process::guarded::Guarded;

/// 32 secret bytes.
pub(crate) type Secret = Guarded<[u8; 32]>;

/// How the messages of a comm are protected.
pub(crate) enum Guard {
    /// Not at all.
    None,
    /// By a checksum, against damage.
    Checksum,
    /// By AES-256-GCM under this key, which belongs to one direction of one channel.
    Seal(Secret),
}

/// The keys of one direction of a channel.
pub(crate) struct HalfKeys {
    /// The connector proves it in its first bytes.
    pub hello: Secret,
    /// For the messages.
    pub guard: Guard,
}

impl HalfKeys {
    /// The key of the hello, if there is one, and the guard.
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
