//! Secrets of the control protocol: in guarded memory, and computed away from the stacks that core dumps contain.

use crate::status::{err, Error, Result};
pub(crate) use process::guarded::{Cleared, Guarded};
use ring::hmac;

/// 32 secret bytes.
pub(crate) type Secret = Guarded<[u8; 32]>;

fn no_memory(e: std::io::Error) -> Error {
    err!(Resource, "no memory for a key: {e}; the address space (ulimit -v) or the host's memory is exhausted")
}

/// [`process::guarded::apart`] for work that can fail.
pub(crate) fn apart<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    process::guarded::apart(work).map_err(no_memory)?
}

/// Moves a secret into guarded memory; call it inside [`apart`].
pub(crate) fn guard<T>(value: T) -> Result<Guarded<T>> {
    Guarded::new(value).map_err(no_memory)
}

/// Guarded zeros.
pub(crate) fn zeroed<const N: usize>() -> Result<Guarded<[u8; N]>> {
    Guarded::zeroed().map_err(no_memory)
}

/// HMAC-SHA256 of a message.
pub(crate) fn sign(key: &Secret, message: &[u8]) -> Result<[u8; 32]> {
    apart(|| {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key[..]), message);
        Ok(std::array::from_fn(|i| tag.as_ref()[i]))
    })
}

/// Whether `tag` is the HMAC-SHA256 of a message.
pub(crate) fn verify(key: &Secret, message: &[u8], tag: &[u8]) -> Result<bool> {
    apart(|| Ok(hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key[..]), message, tag).is_ok()))
}
