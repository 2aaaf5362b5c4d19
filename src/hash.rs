//! The maps that every operation looks up several times. Peers choose some of the keys, so each map has its own seed: a peer that
//! does not know it cannot choose keys that collide. Knows nothing of what is hashed.

/// A map with a quick hash.
pub(crate) type Map<K, V> = std::collections::HashMap<K, V, foldhash::quality::RandomState>;
