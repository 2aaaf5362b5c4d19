//! What ties a channel to the session that set it up: a key that its first bytes prove, and how its messages are guarded. Knows nothing of
//! where keys come from.

use crate::status::Result;
use process::guarded::Guarded;

/// 32 secret bytes.
pub(crate) type Secret = Guarded<[u8; 32]>;

/// How the messages of a comm are guarded.
pub(crate) enum Guard {
    /// Not at all.
    None,
    /// By a checksum, against damage.
    Checksum,
    /// By AES-256-GCM under this key, which belongs to one direction of one channel.
    Seal(Secret),
}

/// What one direction of a channel is secured with.
pub(crate) struct HalfKeys {
    /// The connecting side proves it in its first bytes.
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
