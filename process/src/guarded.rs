//! Memory for secrets: pages that hold nothing else, are left out of core dumps, and are wiped before they are given back; and a stack of
//! such pages for code that computes with secrets. Knows nothing of what the secrets are for.

use crate::Mutex;
use std::cell::Cell;
use std::io::{Error, Result};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use zeroize::Zeroize;

const PAGE: usize = 4096;

/// A value in guarded pages. Not shown by `Debug`.
pub struct Guarded<T> {
    value: NonNull<T>,
    owned: PhantomData<T>,
}

// SAFETY: the memory belongs to this value alone, as a Box's would.
unsafe impl<T: Send> Send for Guarded<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Guarded<T> {}

/// Bytes for a `T`: a power of two up to a page, and whole pages above.
const fn room<T>() -> usize {
    match std::mem::size_of::<T>() {
        bytes @ 0..=PAGE if bytes <= SMALLEST => SMALLEST,
        bytes @ 0..=PAGE => bytes.next_power_of_two(),
        bytes => bytes.div_ceil(PAGE) * PAGE,
    }
}

/// The smallest cell.
const SMALLEST: usize = 64;
/// Sizes of cells: from the smallest to half of a page.
const SIZES: usize = (PAGE / SMALLEST).ilog2() as usize;
/// Attempts at the lock of the cells. In a child that was forked while another thread held it, no thread gives it back.
const ATTEMPTS: u32 = 1 << 16;

/// Free cells of one size, as a list through their first words. Their other bytes are zeros.
struct Cells(Option<NonNull<u8>>);

// SAFETY: the cells belong to the list, and to nothing else.
unsafe impl Send for Cells {}

static CELLS: [Mutex<Cells>; SIZES] = [const { Mutex::new(Cells(None)) }; SIZES];

impl Cells {
    /// The cells of this size, unless it takes whole pages.
    fn of(bytes: usize) -> Option<lock_api::MutexGuard<'static, crate::sync::Raw, Cells>> {
        let cells = CELLS.get((bytes / SMALLEST).ilog2() as usize)?;
        (0..ATTEMPTS).find_map(|attempt| {
            let held = cells.try_lock();
            if held.is_none() && attempt > 0 {
                std::thread::yield_now();
            }
            held
        })
    }

    fn push(&mut self, cell: NonNull<u8>) {
        // SAFETY: a free cell, aligned to its size, which is that of a pointer at least.
        unsafe { cell.cast::<Option<NonNull<u8>>>().write(self.0) };
        self.0 = Some(cell);
    }

    fn pop(&mut self) -> Option<NonNull<u8>> {
        let cell = self.0?;
        // SAFETY: `push` has written it.
        self.0 = unsafe { cell.cast::<Option<NonNull<u8>>>().replace(None) };
        Some(cell)
    }

    /// A free cell, of a new page if there is none.
    fn take(&mut self, bytes: usize) -> Result<NonNull<u8>> {
        if let Some(cell) = self.pop() {
            return Ok(cell);
        }
        let page = map(PAGE)?;
        // SAFETY: within the page.
        (bytes..PAGE).step_by(bytes).for_each(|at| self.push(unsafe { page.add(at) }));
        Ok(page)
    }
}

/// Zeros in guarded pages.
fn take(bytes: usize) -> Result<NonNull<u8>> {
    match Cells::of(bytes) {
        Some(mut cells) => cells.take(bytes),
        None => map(bytes),
    }
}

/// Wipes what [`take`] gave, and gives it back.
///
/// # Safety
/// Nothing uses it any more.
unsafe fn give_back(memory: NonNull<u8>, bytes: usize) {
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), bytes) }.zeroize();
    match Cells::of(bytes) {
        Some(mut cells) => cells.push(memory),
        // SAFETY: by contract; whole pages that `map` gave.
        None if bytes >= PAGE => unsafe {
            libc::munmap(memory.as_ptr().cast(), bytes);
        },
        // A forked child, whose cells cannot be reached.
        None => {}
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
        // A cell is aligned to its size.
        const { assert!(std::mem::align_of::<T>() <= PAGE) };
        let memory = take(room::<T>())?.cast::<T>();
        // SAFETY: the memory is writable, large and aligned enough, and nothing lives in it.
        unsafe { memory.write(value) };
        Ok(Guarded { value: memory, owned: PhantomData })
    }
}

impl<const N: usize> Guarded<[u8; N]> {
    /// Zeros, made in place.
    ///
    /// # Errors
    /// Without memory.
    pub fn zeroed() -> Result<Guarded<[u8; N]>> {
        Ok(Guarded { value: take(room::<[u8; N]>())?.cast(), owned: PhantomData })
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
        // SAFETY: the value is dropped once; afterwards its memory is plain bytes, given back once.
        unsafe {
            self.value.drop_in_place();
            give_back(self.value.cast(), room::<T>());
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

// SAFETY: memory that belongs to the stack alone.
unsafe impl Send for Stack {}

/// Stacks for the next calls: a mapping costs more than the work on it.
static STACKS: Mutex<[Option<Stack>; 4]> = Mutex::new([const { None }; 4]);

impl Stack {
    fn take() -> Result<Stack> {
        let spare = STACKS.try_lock().and_then(|mut stacks| stacks.iter_mut().find_map(Option::take));
        spare.map_or_else(Stack::new, Ok)
    }

    /// Wipes it, and keeps it for the next call.
    fn give_back(self) {
        // The kernel hands out no page that it has not wiped.
        // SAFETY: the part above the lowest page, which nothing runs on any more.
        let wiped = unsafe { libc::madvise(self.0.as_ptr().add(PAGE).cast(), STACK - PAGE, libc::MADV_DONTNEED) } == 0;
        let mut stacks = STACKS.try_lock().filter(|_| wiped);
        if let Some(place) = stacks.as_mut().and_then(|stacks| stacks.iter_mut().find(|place| place.is_none())) {
            *place = Some(self);
        }
    }

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

thread_local! {
    /// Whether this thread is on a guarded stack. Has no destructor, so it exists until the thread's end.
    static APART: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a stack of guarded pages, so that nothing that it and the libraries below it compute with stays behind. What it returns
/// must hold no secret but in [`Guarded`] memory: it lands on the caller's stack. A call within `work` stays on that stack: one call
/// around many costs one stack.
///
/// # Errors
/// Without memory; `work` did not run then.
pub fn apart<T>(work: impl FnOnce() -> T) -> Result<T> {
    fn entry<F: FnOnce() -> T, T>(_: &Job<F, T>) -> unsafe extern "C" fn(*mut u8) {
        perform::<F, T>
    }
    if APART.get() {
        return Ok(work());
    }
    let stack = Stack::take()?;
    let _cleared = Cleared;
    let mut job = Job { work: Some(work), outcome: MaybeUninit::uninit() };
    let perform = entry(&job);
    APART.set(true);
    // SAFETY: the stack's mapping is that long, and page-aligned; the job is of the type that `entry` took. `perform` returns always, and
    // has then written the outcome.
    let outcome = unsafe {
        call_on(stack.0.as_ptr().add(STACK - ABOVE), perform, (&raw mut job).cast());
        job.outcome.assume_init()
    };
    APART.set(false);
    stack.give_back();
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
        let pages: std::collections::HashSet<_> = (0..1000u16)
            .map(|i| {
                let small = [(); 70].map(|()| Guarded::new([i; 20]).unwrap());
                assert!(
                    small.iter().all(|cell| cell.iter().all(|&word| word == i))
                        && flags(small[9].as_ptr() as usize).contains(" dd")
                );
                small[69].as_ptr() as usize / PAGE
            })
            .collect();
        let again = Guarded::<[u8; 40]>::zeroed().unwrap();
        assert!(again.iter().all(|&b| b == 0) && pages.len() < 10, "cells are used again");
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
