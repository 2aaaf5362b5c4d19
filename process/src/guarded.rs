//! Memory for secrets: pages of their own that are left out of core dumps and wiped before they are given back, and a stack of such
//! pages for code that computes with secrets. Knows nothing of what the secrets are for.

use std::io::{Error, Result};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use zeroize::Zeroize;

const PAGE: usize = 4096;

/// A value in pages of its own. Not shown by `Debug`.
pub struct Guarded<T> {
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

/// Fresh pages of zeros, out of core dumps. They come out of the reserve that [`crate::ensure_space`] keeps.
fn map(bytes: usize) -> Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping touches no memory of others.
    let pages = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if pages == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // A kernel without it dumps the pages; that is no reason to refuse a connection.
    // SAFETY: the pages were just mapped with this length.
    unsafe { libc::madvise(pages, bytes, libc::MADV_DONTDUMP) };
    NonNull::new(pages.cast()).ok_or_else(|| Error::other("mmap returned null"))
}

impl<T> Guarded<T> {
    /// Moves `value` into guarded pages. The caller makes a secret value inside [`apart`], so that no copy stays behind.
    ///
    /// # Errors
    /// Without memory.
    pub fn new(value: T) -> Result<Guarded<T>> {
        const { assert!(std::mem::align_of::<T>() <= PAGE) };
        let pages = map(mapped::<T>())?.cast::<T>();
        // SAFETY: the pages are writable, large and aligned enough, and nothing lives in them.
        unsafe { pages.write(value) };
        Ok(Guarded { value: pages, owned: PhantomData })
    }
}

impl<const N: usize> Guarded<[u8; N]> {
    /// Zeros, made in place.
    ///
    /// # Errors
    /// Without memory.
    pub fn zeroed() -> Result<Guarded<[u8; N]>> {
        // Fresh pages hold zeros.
        Ok(Guarded { value: map(mapped::<[u8; N]>())?.cast(), owned: PhantomData })
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

/// Bytes of a stack of guarded pages, its guard page and the room above its first frame.
const STACK: usize = 256 << 10;
/// Zeros above the first frame: who walks the frames, to show a backtrace, finds an end there.
const ABOVE: usize = PAGE;

/// A stack that is given back wiped. Its lowest page cannot be touched.
struct Stack(NonNull<u8>);

impl Stack {
    fn new() -> Result<Stack> {
        let stack = Stack(map(STACK)?);
        // SAFETY: the lowest page of a mapping that nothing uses yet.
        match unsafe { libc::mprotect(stack.0.as_ptr().cast(), PAGE, libc::PROT_NONE) } {
            0 => Ok(stack),
            _ => Err(Error::last_os_error()),
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // The kernel hands out no page that it has not wiped.
        // SAFETY: the whole mapping, which nothing runs on any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), STACK) };
    }
}

/// What runs on the other stack, and what came of it.
struct Job<F, T> {
    work: Option<F>,
    outcome: MaybeUninit<std::thread::Result<T>>,
}

/// Runs the job at `job`. Nothing unwinds out of it.
///
/// # Safety
/// `job` is a `Job<F, T>` whose work was not done yet, and nothing else uses it.
unsafe extern "C" fn perform<F: FnOnce() -> T, T>(job: *mut u8) {
    // SAFETY: by contract.
    let job = unsafe { &mut *job.cast::<Job<F, T>>() };
    let work = job.work.take();
    job.outcome.write(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match work {
        Some(work) => work(),
        None => unreachable!("a job is done once"),
    })));
}

/// Calls `perform(job)` with its frames below `top`.
///
/// # Safety
/// `top` is the aligned upper end of a stack that nothing else uses; `perform` may be called with `job` and does not unwind.
#[inline(never)]
unsafe fn call_on(top: *mut u8, perform: unsafe extern "C" fn(*mut u8), job: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by contract. The stack pointer is kept in a register that a callee preserves, and is put back.
    unsafe {
        std::arch::asm!(
            "mov r12, rsp", "mov rsp, {top}", "call {perform}", "mov rsp, r12",
            top = in(reg) top, perform = in(reg) perform, in("rdi") job, out("r12") _, clobber_abi("C"),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "mov x20, sp", "mov sp, {top}", "blr {perform}", "mov sp, x20",
            top = in(reg) top, perform = in(reg) perform, in("x0") job, out("x20") _, clobber_abi("C"),
        );
    }
}

/// Clears the vector registers when it is dropped: ciphers and copies leave parts of keys there, which a core dump would contain and a signal
/// handler would put on the stack. Hold it while a key is used.
pub struct Cleared;

impl Drop for Cleared {
    #[cfg(target_arch = "x86_64")]
    fn drop(&mut self) {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has these registers, and all of them count as clobbered.
            unsafe {
                std::arch::asm!(
                "vpxord zmm16, zmm16, zmm16\n vpxord zmm17, zmm17, zmm17\n vpxord zmm18, zmm18, zmm18\n vpxord zmm19, zmm19, zmm19\n \
                 vpxord zmm20, zmm20, zmm20\n vpxord zmm21, zmm21, zmm21\n vpxord zmm22, zmm22, zmm22\n vpxord zmm23, zmm23, zmm23\n \
                 vpxord zmm24, zmm24, zmm24\n vpxord zmm25, zmm25, zmm25\n vpxord zmm26, zmm26, zmm26\n vpxord zmm27, zmm27, zmm27\n \
                 vpxord zmm28, zmm28, zmm28\n vpxord zmm29, zmm29, zmm29\n vpxord zmm30, zmm30, zmm30\n vpxord zmm31, zmm31, zmm31",
                clobber_abi("C"), options(nomem, nostack));
            }
        }
        if std::arch::is_x86_feature_detected!("avx") {
            // SAFETY: as above.
            unsafe { std::arch::asm!("vzeroall", clobber_abi("C"), options(nomem, nostack)) };
        } else {
            // SAFETY: every processor of this kind has these; as above.
            unsafe {
                std::arch::asm!(
                    "xorps xmm0, xmm0\n xorps xmm1, xmm1\n xorps xmm2, xmm2\n xorps xmm3, xmm3\n xorps xmm4, xmm4\n \
                 xorps xmm5, xmm5\n xorps xmm6, xmm6\n xorps xmm7, xmm7\n xorps xmm8, xmm8\n xorps xmm9, xmm9\n \
                 xorps xmm10, xmm10\n xorps xmm11, xmm11\n xorps xmm12, xmm12\n xorps xmm13, xmm13\n xorps xmm14, xmm14\n \
                 xorps xmm15, xmm15",
                    clobber_abi("C"),
                    options(nomem, nostack)
                );
            }
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn drop(&mut self) {
        // SAFETY: every processor of this kind has these, and they count as clobbered. The others belong to the caller, who keeps no key there.
        unsafe {
            std::arch::asm!(
                "movi v0.2d, #0\n movi v1.2d, #0\n movi v2.2d, #0\n movi v3.2d, #0\n movi v4.2d, #0\n movi v5.2d, #0\n \
                 movi v6.2d, #0\n movi v7.2d, #0\n movi v16.2d, #0\n movi v17.2d, #0\n movi v18.2d, #0\n movi v19.2d, #0\n \
                 movi v20.2d, #0\n movi v21.2d, #0\n movi v22.2d, #0\n movi v23.2d, #0\n movi v24.2d, #0\n movi v25.2d, #0\n \
                 movi v26.2d, #0\n movi v27.2d, #0\n movi v28.2d, #0\n movi v29.2d, #0\n movi v30.2d, #0\n movi v31.2d, #0",
                clobber_abi("C"),
                options(nomem, nostack)
            );
        }
    }
}

/// Runs `work` on a stack of guarded pages, so that nothing that it and the libraries below it compute with stays behind. What it returns
/// must hold no secret but in [`Guarded`] memory: it lands on the caller's stack.
///
/// # Errors
/// Without memory; `work` did not run then.
pub fn apart<T>(work: impl FnOnce() -> T) -> Result<T> {
    fn entry<F: FnOnce() -> T, T>(_: &Job<F, T>) -> unsafe extern "C" fn(*mut u8) {
        perform::<F, T>
    }
    let stack = Stack::new()?;
    let _cleared = Cleared;
    let mut job = Job { work: Some(work), outcome: MaybeUninit::uninit() };
    let perform = entry(&job);
    // SAFETY: the stack's mapping is that long, and page-aligned; the job is of the type that `entry` took. `perform` returns always, and
    // has then written the outcome.
    let outcome = unsafe {
        call_on(stack.0.as_ptr().add(STACK - ABOVE), perform, (&raw mut job).cast());
        job.outcome.assume_init()
    };
    drop(stack);
    match outcome {
        Ok(value) => Ok(value),
        Err(panic) => std::panic::resume_unwind(panic),
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

    #[test]
    fn work_runs_apart_and_its_panics_come_back() {
        let here = 0u8;
        let (sum, there) = apart(|| {
            let big = std::hint::black_box([1u8; 100 << 10]);
            (big.iter().map(|&b| usize::from(b)).sum::<usize>(), flags(big.as_ptr() as usize))
        })
        .unwrap();
        assert_eq!(sum, 100 << 10);
        assert!(there.split(' ').any(|f| f == "dd") && !flags(&raw const here as usize).split(' ').any(|f| f == "dd"));
        let nested = apart(|| apart(|| 7).unwrap() + 1).unwrap();
        assert_eq!(nested, 8);
        let panic = std::panic::catch_unwind(|| apart(|| panic!("a defect"))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"a defect"));
        println!("{}", apart(std::backtrace::Backtrace::force_capture).unwrap());
    }

    #[test]
    fn nothing_stays_behind() {
        let count = |what: &str| std::fs::read_to_string("/proc/self/maps").unwrap().matches(what).count();
        apart(|| ()).unwrap();
        let before = count("\n");
        (0..100).for_each(|_| apart(|| ()).unwrap());
        assert!(count("\n") < before + 50, "stacks are given back");
    }
}
