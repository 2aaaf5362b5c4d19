//! Pre-shared keys: reading the key file, naming its keys, and noticing changes. Knows nothing of the handshake that uses them.
//! Keys live in guarded memory and are never shown.
//!
//! The file is either one key or a list. One key is 16 to 4096 bytes that are not text, or one line of text without a colon,
//! whose newline does not count. A list has lines `NAME:KEY`, empty lines and lines that start with `#`. A name has 1 to 32
//! letters, digits, `.`, `_` or `-`; a key is the rest of its line without surrounding blanks, 16 to 4096 printable characters. A
//! connector proves the first key; a listener accepts any key of the file.

use super::secret::{apart, guard, zeroed, Guarded};
use super::text;
use crate::status::{bail, err, Error, Result};
use process::{Mutex, PerProcess};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind as Io, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, SystemTime};

/// Most keys of one file.
pub(crate) const MAX_KEYS: usize = 16;
const MAX_FILE: usize = 64 << 10;
const KEY_BYTES: std::ops::RangeInclusive<usize> = 16..=4096;
const MAX_NAME: usize = 32;
/// A file that changed this recently may change again with the same time stamp.
const SETTLED: Duration = Duration::from_secs(2);

/// The secrets that the handshake derives from a key.
#[derive(Clone, Copy)]
pub(crate) struct KeySecrets {
    /// The pre-shared key of the Noise handshake.
    pub psk: [u8; 32],
    /// Lets the listener find out which of its keys the connector uses.
    pub selector: [u8; 32],
}

/// How a peer proved itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Proof {
    /// No key is configured.
    Nothing,
    /// The only key of a file without names.
    Key,
    /// The key that has this name in this engine's file.
    Named(Arc<str>),
}

impl Proof {
    /// The name of the proved key, for reports about the peer.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Proof::Named(name) => Some(name),
            Proof::Nothing | Proof::Key => None,
        }
    }
}

/// The keys of a file at one moment. Empty if no key is configured.
pub(crate) struct Keys {
    proofs: Vec<Proof>,
    secrets: Option<Guarded<[KeySecrets; MAX_KEYS]>>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keys").field(&self.proofs).finish()
    }
}

impl Keys {
    /// No key: connections are encrypted, but anyone may connect.
    pub(crate) fn none() -> Keys {
        Keys { proofs: Vec::new(), secrets: None }
    }

    /// Whether there is no key.
    pub(crate) fn is_empty(&self) -> bool {
        self.proofs.is_empty()
    }

    /// The keys in the order of the file; connects use the first one.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Proof, &KeySecrets)> {
        self.proofs.iter().zip(self.secrets.iter().flat_map(|s| s.iter()))
    }

    /// Parses the contents of a key file.
    ///
    /// # Errors
    /// `InvalidArgument` says what is wrong; it never shows any part of a key.
    pub(crate) fn parse(contents: &[u8]) -> Result<Keys> {
        let found = match list(contents)? {
            Some(list) => list,
            None => vec![(Proof::Key, single(contents)?)],
        };
        let mut secrets = guard([KeySecrets { psk: [0; 32], selector: [0; 32] }; MAX_KEYS])?;
        apart(|| secrets.iter_mut().zip(&found).try_for_each(|(secret, (_, key))| derive(key, secret)))?;
        let same = |a: usize, b: usize| secrets[a].psk == secrets[b].psk;
        if let Some(b) = (1..found.len()).find(|&b| (0..b).any(|a| same(a, b))) {
            bail!(InvalidArgument, "key {} is a duplicate", b + 1);
        }
        Ok(Keys { proofs: found.into_iter().map(|(proof, _)| proof).collect(), secrets: Some(secrets) })
    }
}

/// Must run inside [`apart`]: ring passes the pseudo-random key by value.
fn derive(key: &[u8], out: &mut KeySecrets) -> Result<()> {
    use ring::hkdf::{Salt, HKDF_SHA256};
    let prk = Salt::new(HKDF_SHA256, b"uccl pre-shared key").extract(key);
    for (info, part) in [(b"noise".as_slice(), &mut out.psk), (b"selector", &mut out.selector)] {
        let filled = prk.expand(&[info], HKDF_SHA256).and_then(|okm| okm.fill(part));
        filled.map_err(|_| err!(Internal, "a key could not be derived"))?;
    }
    Ok(())
}

/// Whether the contents are text: UTF-8 without control characters other than line ends and tabs.
fn is_text(contents: &[u8]) -> bool {
    let blank = |c: char| c.is_ascii_whitespace();
    std::str::from_utf8(contents).is_ok_and(|text| text.chars().all(|c| blank(c) || !c.is_control()))
}

/// The contents as one key.
fn single(contents: &[u8]) -> Result<&[u8]> {
    let key = match contents {
        [key @ .., b'\r', b'\n'] | [key @ .., b'\n'] if is_text(contents) => key,
        key => key,
    };
    if !KEY_BYTES.contains(&key.len()) {
        bail!(InvalidArgument, "a key of {} bytes, expected {} to {}", key.len(), KEY_BYTES.start(), KEY_BYTES.end());
    }
    if key.iter().all(u8::is_ascii_whitespace) {
        bail!(InvalidArgument, "a key of blanks only");
    }
    Ok(key)
}

fn is_name(name: &[u8]) -> bool {
    let fits = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=MAX_NAME).contains(&name.len()) && name.iter().all(fits)
}

/// A key of the file, and the proof that stands for it.
type Found<'a> = (Proof, &'a [u8]);

/// The contents as a list; `None` if they are one key: not text, or one line of text without a colon.
fn list(contents: &[u8]) -> Result<Option<Vec<Found<'_>>>> {
    let lines = || contents.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    let plain = |line: &[u8]| !line.starts_with(b"#") && !line.contains(&b':');
    let mut rest = lines().filter(|line| !line.is_empty());
    let one_key = rest.next().is_none_or(plain) && rest.next().is_none();
    if one_key || !is_text(contents) {
        return Ok(None);
    }
    let mut found: Vec<Found<'_>> = Vec::new();
    for (i, line) in contents.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let Some(colon) = line.iter().position(|&b| b == b':').filter(|&at| is_name(&line[..at])) else {
            bail!(
                InvalidArgument,
                "line {}: expected NAME:KEY, a name has 1 to {MAX_NAME} letters, digits, '.', '_' and '-'",
                i + 1
            );
        };
        let (name, key) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !key.iter().copied().all(text::is_printable) {
            bail!(InvalidArgument, "line {}: the key is not printable ASCII", i + 1);
        }
        if !KEY_BYTES.contains(&key.len()) {
            bail!(
                InvalidArgument,
                "line {}: a key of {} bytes, expected {} to {}",
                i + 1,
                key.len(),
                KEY_BYTES.start(),
                KEY_BYTES.end()
            );
        }
        let proof = Proof::Named(String::from_utf8_lossy(name).into());
        if found.iter().any(|(other, _)| *other == proof) {
            bail!(InvalidArgument, "line {}: a second key with the same name", i + 1);
        }
        if found.len() == MAX_KEYS {
            bail!(InvalidArgument, "more than {MAX_KEYS} keys");
        }
        found.push((proof, key));
    }
    if found.is_empty() {
        bail!(InvalidArgument, "no key");
    }
    Ok(Some(found))
}

/// Distinguishes the states of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    mode: u32,
}

impl Stamp {
    fn of(meta: &Metadata) -> Stamp {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            mode: meta.mode(),
        }
    }
}

/// Whether the file may be used as a key file.
fn admissible(path: &Path, meta: &Metadata) -> Result<()> {
    let kind = meta.file_type();
    if !kind.is_file() {
        let what = match kind {
            k if k.is_dir() => "a directory",
            k if k.is_fifo() => "a FIFO",
            k if k.is_socket() => "a socket",
            _ => "a device",
        };
        bail!(InvalidArgument, "it is {what}, not a regular file");
    }
    if meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o7777;
        bail!(InvalidArgument, "users other than its owner can access it (mode {mode:04o}); run: chmod 600 '{}'", path.display());
    }
    if meta.size() > MAX_FILE as u64 {
        bail!(InvalidArgument, "{} bytes, {MAX_FILE} at most", meta.size());
    }
    Ok(())
}

/// Reads the file once. The metadata are those of the file that was read.
fn read(path: &Path) -> Result<(Keys, Metadata)> {
    let failed = |e: std::io::Error| err!(InvalidArgument, "{e}");
    // Opening a device or a FIFO can have side effects.
    admissible(path, &std::fs::metadata(path).map_err(failed)?)?;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    admissible(path, &meta)?;
    let mut contents = zeroed::<{ MAX_FILE + 1 }>()?;
    let len = fill(&mut file, &mut *contents).map_err(failed)?;
    if len > MAX_FILE {
        bail!(InvalidArgument, "more than {MAX_FILE} bytes");
    }
    Ok((Keys::parse(&contents[..len])?, meta))
}

/// Reads to the end of the file or of `buf`.
fn fill(file: &mut File, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut at = 0;
    while at < buf.len() {
        match file.read(&mut buf[at..]) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if e.kind() == Io::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(at)
}

struct Loaded {
    keys: Arc<Keys>,
    /// State of the file that the keys are from; `None`: read the file again.
    stamp: Option<Stamp>,
    /// The last failure to read it again, so that it is logged once.
    failure: Option<Error>,
}

impl Loaded {
    /// The stamp to compare with next time. `None` if the file changed so recently that it may change again with the same time
    /// stamp.
    fn settled(meta: &Metadata) -> Option<Stamp> {
        let age = |t: SystemTime| SystemTime::now().duration_since(t).unwrap_or_default();
        let old = meta.modified().is_ok_and(|t| age(t) > SETTLED);
        old.then(|| Stamp::of(meta))
    }
}

/// The key file of an engine. It is read again when it changes, so that keys can be added and removed while the engine runs.
pub(crate) struct KeyStore {
    path: Option<PathBuf>,
    loaded: Mutex<Loaded>,
}

impl std::fmt::Debug for KeyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl KeyStore {
    /// Reads the key file, if one is configured.
    ///
    /// # Errors
    /// `InvalidArgument` names the file and what is wrong with it.
    pub(crate) fn open(path: Option<&Path>) -> Result<KeyStore> {
        let Some(path) = path else {
            static LOGGED: PerProcess<Once> = PerProcess::new(Once::new);
            LOGGED.get().call_once(|| {
                log::info!("no pre-shared key (UCCL_TCPX_AUTH_KEY_FILE): connections are encrypted, but any engine may connect")
            });
            let loaded = Loaded { keys: Arc::new(Keys::none()), stamp: None, failure: None };
            return Ok(KeyStore { path: None, loaded: Mutex::new(loaded) });
        };
        let (keys, meta) = read(path).map_err(|e| KeyStore::named(path, &e))?;
        let loaded = Loaded { keys: Arc::new(keys), stamp: Loaded::settled(&meta), failure: None };
        Ok(KeyStore { path: Some(path.to_owned()), loaded: Mutex::new(loaded) })
    }

    fn named(path: &Path, error: &Error) -> Error {
        Error::new(error.kind(), format_args!("UCCL_TCPX_AUTH_KEY_FILE={}: {error}", path.display()))
    }

    /// The current keys. If the file can no longer be read, the keys stay as they were and the log says so once.
    pub(crate) fn current(&self) -> Arc<Keys> {
        let mut loaded = self.loaded.lock();
        if let Some(path) = &self.path {
            let now = std::fs::metadata(path).ok().map(|m| Stamp::of(&m));
            if loaded.stamp.is_none() || now != loaded.stamp {
                KeyStore::reload(path, &mut loaded);
            }
        }
        loaded.keys.clone()
    }

    fn reload(path: &Path, loaded: &mut Loaded) {
        match read(path) {
            Ok((keys, meta)) => {
                let names = |k: &Keys| format!("{k:?}");
                if loaded.failure.take().is_some() || names(&keys) != names(&loaded.keys) {
                    log::info!("UCCL_TCPX_AUTH_KEY_FILE={}: read again, now {} keys", path.display(), keys.proofs.len());
                }
                *loaded = Loaded { keys: Arc::new(keys), stamp: Loaded::settled(&meta), failure: None };
            }
            Err(e) => {
                if loaded.failure.as_ref() != Some(&e) {
                    log::warn!("{}; the previous keys stay in use", KeyStore::named(path, &e));
                    loaded.failure = Some(e);
                }
                loaded.stamp = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ErrorKind;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    const A: &str = "0123456789abcdef";
    const B: &str = "fedcba9876543210";

    fn proofs(contents: &[u8]) -> Result<Vec<Proof>> {
        Keys::parse(contents).map(|k| k.proofs)
    }

    fn psk(contents: &[u8]) -> [u8; 32] {
        Keys::parse(contents).unwrap().iter().next().unwrap().1.psk
    }

    #[test]
    fn one_key_or_a_list_of_names() {
        let named = |names: &[&str]| Ok(names.iter().map(|&n| Proof::Named(n.into())).collect::<Vec<_>>());
        assert_eq!(proofs(A.as_bytes()), Ok(vec![Proof::Key]));
        assert_eq!(proofs(&[0xff; 4096]), Ok(vec![Proof::Key]));
        assert_eq!(proofs(b"my very secret 0123456789\n"), Ok(vec![Proof::Key]));
        assert_eq!(
            proofs(b"\n\x80:0123456789abcdef\nx:0123456789abcdef\n"),
            Ok(vec![Proof::Key]),
            "what is not text is not a list"
        );
        assert_eq!(proofs(b"# two\n\n a: 0123456789abcdef \r\nb.c_d-9:fedcba9876543210"), named(&["a", "b.c_d-9"]));
        // A key in a list equals the key of a file that holds nothing else, with or without its newline.
        for file in ["0123456789abcdef\n", "0123456789abcdef\r\n", "x:0123456789abcdef", "x: 0123456789abcdef\n"] {
            assert_eq!(psk(file.as_bytes()), psk(A.as_bytes()), "{file:?}");
        }
        assert_ne!(psk(A.as_bytes()), psk(B.as_bytes()));
        let binary = [&[0x80; 20][..], b"\n"].concat();
        assert_ne!(psk(&binary), psk(&[0x80; 20]), "a binary key counts to its last byte");
    }

    #[test]
    fn errors_never_show_the_key() {
        let long = "k".repeat(4097);
        let blanks = " ".repeat(100);
        let many: String = (0..17).map(|i| format!("n{i}:{A}{i}\n")).collect();
        for (contents, part) in [
            ("", "0 bytes"),
            ("short", "5 bytes"),
            (long.as_str(), "4097 bytes"),
            ("a:0123456789\n", "line 1: a key of 10 bytes"),
            ("a:0123456789abcdef\nSECRETSECRETSECRET\n", "line 2: expected NAME:KEY"),
            ("a:0123456789abcdef\na:SECRETSECRETSECRET\n", "line 2: a second key"),
            ("a:0123456789abcdef\nb:0123456789abcdef\n", "key 2 is a duplicate"),
            ("a:SECRETSECRET\u{e9}SECRET\n", "not printable"),
            ("my very name:SECRETSECRETSECRET", "line 1: expected NAME:KEY"),
            ("node a:SECRETSECRETSECRET\nb:0123456789abcdef\n", "line 1: expected NAME:KEY"),
            ("n\u{f6}de:SECRETSECRETSECRET\nb:0123456789abcdef\n", "line 1: expected NAME:KEY"),
            ("# two\nSECRETSECRETSECRET\n", "line 2: expected NAME:KEY"),
            ("SECRETSECRETSECRET\nSECRETSECRETSECRET\n", "line 1: expected NAME:KEY"),
            ("# nothing", "no key"),
            (blanks.as_str(), "blanks only"),
            (many.as_str(), "more than 16"),
        ] {
            let error = Keys::parse(contents.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(part) && !error.to_string().contains("SECRET"), "{contents:?}: {error}");
        }
        let shown = format!("{:?}", Keys::parse(b"alice:0123456789abcdef").unwrap());
        assert!(shown.contains("alice") && !shown.contains("0123456789"), "{shown}");
    }

    /// A temporary directory, removed at the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Dir {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("uccl-keys-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }

        fn write(&self, name: &str, contents: &str, mode: u32) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, contents).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }

        fn replace(&self, path: &Path, contents: &str) {
            std::fs::rename(self.write("next", contents, 0o600), path).unwrap();
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn refusal(path: &Path) -> String {
        let error = KeyStore::open(Some(path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().starts_with(&format!("UCCL_TCPX_AUTH_KEY_FILE={}: ", path.display())), "{error}");
        error.to_string()
    }

    #[test]
    fn only_a_regular_file_of_its_owner_is_read() {
        let dir = Dir::new();
        for mode in [0o640, 0o604, 0o620, 0o602, 0o666, 0o610] {
            let path = dir.write("open", A, mode);
            let text = refusal(&path);
            assert!(text.contains(&format!("chmod 600 '{}'", path.display())) && text.contains(&format!("{mode:04o}")), "{text}");
        }
        let good = dir.write("good", A, 0o400);
        let link = dir.0.join("link");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        for path in [&good, &link] {
            assert!(!KeyStore::open(Some(path)).unwrap().current().is_empty());
        }
        // None of these may block, or be read without an end.
        let fifo = dir.0.join("fifo");
        let c_path = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
        assert!(refusal(&fifo).contains("a FIFO"));
        assert!(refusal(Path::new("/dev/zero")).contains("a device"));
        assert!(refusal(&dir.0).contains("a directory"));
        assert!(refusal(&dir.0.join("missing")).contains("No such file"));
        let large = dir.write("large", "", 0o600);
        OpenOptions::new().write(true).open(&large).unwrap().set_len(1 << 40).unwrap();
        assert!(refusal(&large).contains("65536 at most"));
    }

    #[test]
    fn a_changed_file_takes_effect_at_once_and_a_broken_one_does_not() {
        let dir = Dir::new();
        let path = dir.write("keys", &format!("old:{A}\n"), 0o600);
        let store = KeyStore::open(Some(&path)).unwrap();
        let names = || store.current().proofs.iter().map(|p| p.name().unwrap_or("-").to_owned()).collect::<Vec<_>>();
        assert_eq!(names(), ["old"]);
        dir.replace(&path, &format!("new:{B}\nold:{A}\n"));
        assert_eq!(names(), ["new", "old"]);
        // Changed in place, with the same length, within one tick of the file system's clock.
        for name in ["one", "two", "six"] {
            dir.write("keys", &format!("{name}:{B}\n"), 0o600);
            assert_eq!(names(), [name]);
        }
        for _ in 0..2 {
            dir.replace(&path, "short");
            assert_eq!(names(), ["six"]);
            dir.write("keys", A, 0o644);
            assert_eq!(names(), ["six"]);
            std::fs::remove_file(&path).unwrap();
            assert_eq!(names(), ["six"]);
        }
        dir.replace(&path, A);
        assert_eq!(names(), ["-"]);
        assert!(KeyStore::open(None).unwrap().current().is_empty());
    }
}
