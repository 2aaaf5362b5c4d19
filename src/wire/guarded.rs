//! Memory for secrets: pages of their own that are left out of core dumps and wiped before they are given back. Knows nothing of what
//! the secrets are for.

use crate::status::{Error, Result};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use zeroize::Zeroize;

const PAGE: usize = 4096;

/// A value in pages of its own. Not shown by `Debug`.
pub(crate) struct Guarded<T> {
    value: NonNull<T>,
    owned: PhantomData<T>,
}

// SAFETY: the pages belong to this value alone, as a Box's would.
unsafe impl<T: Send> Send for Guarded<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Guarded<T> {}

/// Bytes mapped for a `T`.
const fn mapped<T>() -> usize {
    let bytes = std::mem::size_of::<T>();
    if bytes == 0 {
        PAGE
    } else {
        bytes.div_ceil(PAGE) * PAGE
    }
}

/// Fresh pages of zeros for a `T`, out of core dumps.
fn map<T>() -> Result<NonNull<T>> {
    const { assert!(std::mem::align_of::<T>() <= PAGE) };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping touches no memory of others.
    let pages = unsafe { libc::mmap(std::ptr::null_mut(), mapped::<T>(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if pages == libc::MAP_FAILED {
        return Err(Error::new(
            crate::status::ErrorKind::Resource,
            format_args!("memory for a key: {}", std::io::Error::last_os_error()),
        ));
    }
    // A kernel without it dumps the pages; that is no reason to refuse a connection.
    // SAFETY: the pages were just mapped with this length.
    unsafe { libc::madvise(pages, mapped::<T>(), libc::MADV_DONTDUMP) };
    NonNull::new(pages.cast()).ok_or_else(|| Error::new(crate::status::ErrorKind::Internal, "mmap returned null"))
}

impl<T> Guarded<T> {
    /// Moves `value` into guarded pages. What the caller held it in before is the caller's to wipe.
    pub(crate) fn new(value: T) -> Result<Guarded<T>> {
        let pages = map::<T>()?;
        // SAFETY: the pages are writable, large and aligned enough, and nothing lives in them.
        unsafe { pages.write(value) };
        Ok(Guarded { value: pages, owned: PhantomData })
    }
}

impl<const N: usize> Guarded<[u8; N]> {
    /// Zeros, made in place.
    pub(crate) fn zeroed() -> Result<Guarded<[u8; N]>> {
        // Fresh pages hold zeros.
        Ok(Guarded { value: map()?, owned: PhantomData })
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: a valid T lives there until drop.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a valid T lives there until drop, and self is borrowed mutably.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the value is dropped once; afterwards its pages are plain bytes of this mapping, wiped and unmapped once.
        unsafe {
            self.value.drop_in_place();
            std::slice::from_raw_parts_mut(self.value.as_ptr().cast::<u8>(), mapped::<T>()).zeroize();
            libc::munmap(self.value.as_ptr().cast(), mapped::<T>());
        }
    }
}

impl<T> std::fmt::Debug for Guarded<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guarded(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The VmFlags of the mapping that holds `address`.
    fn flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            if let Some((from, to)) =
                range.and_then(|(a, b)| Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?)))
            {
                inside = (from..to).contains(&address);
            }
            if inside && line.starts_with("VmFlags:") {
                return line.to_owned();
            }
        }
        panic!("no mapping of {address:#x}");
    }

    #[test]
    fn pages_are_out_of_core_dumps_and_values_are_dropped() {
        struct Noisy<'a>(&'a std::cell::Cell<u32>);
        impl Drop for Noisy<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let drops = std::cell::Cell::new(0);
        drop(Guarded::new(Noisy(&drops)).unwrap());
        assert_eq!(drops.get(), 1);
        let mut key = Guarded::<[u8; 5000]>::zeroed().unwrap();
        assert!(key.iter().all(|&b| b == 0));
        key[4999] = 7;
        assert!(flags(key.as_ptr() as usize).split(' ').any(|f| f == "dd"));
        assert_eq!(format!("{key:?}"), "Guarded(..)");
    }
}
