//! The cryptography of the handshake: X25519, AES-256-GCM and SHA-256 in the form that `snow` asks for, with their secrets in
//! guarded memory. Knows nothing of messages. Call it inside [`process::guarded::apart`]: `snow` and the libraries below it leave
//! copies on the stack.

use process::guarded::Guarded;
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};
use ring::digest;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, RingResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::Error;
use x25519_dalek::{PublicKey, StaticSecret};

/// Bytes of a key, private, public or shared.
pub(crate) const KEY: usize = 32;
/// Bytes of a tag.
pub(crate) const TAG: usize = 16;

/// The implementations for one handshake. `own`: the public half of the key that will be set, so that it need not be computed
/// again.
pub(crate) struct Primitives {
    pub own: [u8; KEY],
}

impl CryptoResolver for Primitives {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        RingResolver.resolve_rng()
    }
    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let fits = matches!(choice, DHChoice::Curve25519);
        Some(Box::new(X25519 { private: Guarded::zeroed().ok().filter(|_| fits)?, public: self.own }))
    }
    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        let fits = matches!(choice, HashChoice::SHA256);
        let fresh = digest::Context::new(&digest::SHA256);
        Some(Box::new(Sha256 { context: Guarded::new(fresh).ok().filter(|_| fits)? }))
    }
    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        let fits = matches!(choice, CipherChoice::AESGCM);
        Some(Box::new(AesGcm { key: Guarded::new(cipher_key(&[0; KEY])?).ok().filter(|_| fits)? }))
    }
}

/// The public half of a private key.
pub(crate) fn public_key(private: &[u8; KEY]) -> [u8; KEY] {
    PublicKey::from(&StaticSecret::from(*private)).to_bytes()
}

/// A key pair of X25519.
struct X25519 {
    private: Guarded<[u8; KEY]>,
    public: [u8; KEY],
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }
    fn pub_len(&self) -> usize {
        KEY
    }
    fn priv_len(&self) -> usize {
        KEY
    }
    /// Takes the engine's own key, whose public half is already known.
    fn set(&mut self, private: &[u8]) {
        self.private.copy_from_slice(private);
    }
    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        rng.try_fill_bytes(&mut *self.private)?;
        self.public = public_key(&self.private);
        Ok(())
    }
    fn pubkey(&self) -> &[u8] {
        &self.public
    }
    fn privkey(&self) -> &[u8] {
        &*self.private
    }
    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let public = public.first_chunk::<KEY>().ok_or(Error::Dh)?;
        let shared = StaticSecret::from(*self.private).diffie_hellman(&PublicKey::from(*public));
        // With a peer's key of low order the result would be the same for every private key.
        if !shared.was_contributory() {
            return Err(Error::Dh);
        }
        out[..KEY].copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

struct Sha256 {
    context: Guarded<digest::Context>,
}

impl Hash for Sha256 {
    fn name(&self) -> &'static str {
        "SHA256"
    }
    fn block_len(&self) -> usize {
        64
    }
    fn hash_len(&self) -> usize {
        32
    }
    fn reset(&mut self) {
        *self.context = digest::Context::new(&digest::SHA256);
    }
    fn input(&mut self, data: &[u8]) {
        self.context.update(data);
    }
    fn result(&mut self, out: &mut [u8]) {
        out[..32].copy_from_slice(self.context.clone().finish().as_ref());
    }
}

fn cipher_key(key: &[u8; KEY]) -> Option<LessSafeKey> {
    Some(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?))
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

struct AesGcm {
    key: Guarded<LessSafeKey>,
}

impl Cipher for AesGcm {
    fn name(&self) -> &'static str {
        "AESGCM"
    }
    fn set(&mut self, key: &[u8; KEY]) {
        if let Some(key) = cipher_key(key) {
            *self.key = key;
        }
    }
    fn encrypt(&self, number: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (sealed, rest) = out.split_at_mut(plaintext.len());
        sealed.copy_from_slice(plaintext);
        match self.key.seal_in_place_separate_tag(nonce(number), Aad::from(authtext), sealed) {
            Ok(tag) => rest[..TAG].copy_from_slice(tag.as_ref()),
            // Only beyond 64 GiB, longer than any message. No plaintext may be sent.
            Err(_) => sealed.fill(0),
        }
        plaintext.len() + TAG
    }
    fn decrypt(&self, number: u64, authtext: &[u8], ciphertext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        // For a static key `snow` gives a buffer with room for the plaintext only.
        let mut buffer = ciphertext.to_vec();
        let opened = self.key.open_in_place(nonce(number), Aad::from(authtext), &mut buffer);
        let plain = opened.map_err(|_| Error::Decrypt)?;
        out.get_mut(..plain.len()).ok_or(Error::Decrypt)?.copy_from_slice(plain);
        Ok(plain.len())
    }
}
