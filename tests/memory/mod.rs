//! Memory for tests: host memory, or GPU memory with UCCL_TEST_MEMORY=gpu, allocated in every way that applications do.
#![allow(dead_code)] // each test target uses its part

use cuda_driver::{sys, Context, Stream};
use std::borrow::Cow;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

/// Where a test wants memory. GPUs are real ones with UCCL_TEST_MEMORY=gpu (one that is alone is both); else they are host memory, which
/// an engine with UCCL_TCPX_EMULATE_DEVICE=1 takes for a GPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Host,
    /// `cuMemAlloc` on the first GPU.
    FirstGpu,
    /// `cuMemAlloc` on the last GPU.
    LastGpu,
    /// The first GPU's default pool, as cudaMallocAsync takes it.
    Pool,
    /// `cuMemCreate` and `cuMemMap` on the first GPU, as PyTorch's expandable segments do.
    Mapped,
    /// The same, marked as capable of GPUDirect RDMA.
    MappedForRdma,
    /// Managed memory.
    Managed,
    /// Pinned host memory.
    Pinned,
}

impl Place {
    /// Host memory and that of two GPUs.
    pub const ALL: [Place; 3] = [Place::Host, Place::FirstGpu, Place::LastGpu];
    /// Everything that applications register.
    pub const KINDS: [Place; 8] = [
        Place::Host,
        Place::FirstGpu,
        Place::LastGpu,
        Place::Pool,
        Place::Mapped,
        Place::MappedForRdma,
        Place::Managed,
        Place::Pinned,
    ];
}

/// Whether tests use real GPUs.
pub fn gpus_wanted() -> bool {
    std::env::var("UCCL_TEST_MEMORY").as_deref() == Ok("gpu")
}

pub enum Memory {
    Host(Vec<u8>),
    Cuda(Cuda),
}

/// Memory that CUDA knows.
pub struct Cuda {
    stream: Stream,
    place: Place,
    at: u64,
    len: usize,
    /// Physical memory behind mapped memory, and the length of the mapping.
    physical: (u64, usize),
}

/// Work of a test that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// Bytes of one copy. The driver holds the context while it copies pageable memory: 5 GiB at once took 6 to 8 s on an H200 in a virtual
/// machine, longer than a plugin's set-up call, which needs the context, may take.
const PIECE: usize = 64 << 20;

/// The primary context of a GPU, current in the calling thread from now on, as CUDA's runtime leaves it.
pub fn enter(ordinal: i32) -> Arc<Context> {
    let driver = cuda_driver::driver().expect("UCCL_TEST_MEMORY=gpu asks for a CUDA driver with a GPU");
    let context = Context::retain(ordinal).expect("context");
    // SAFETY: the context is kept for the life of the process.
    unsafe { driver.relaxed().cuCtxSetCurrent(context.id() as *mut c_void) }.expect("current");
    std::mem::forget(context.clone());
    context
}

/// Mapped physical GPU memory: handle, length and address.
///
/// # Safety
/// The GPU's context is current.
unsafe fn map(cuda: &sys::Functions, len: usize, rdma: bool) -> cuda_driver::Result<(u64, usize, u64)> {
    const DEVICE: u32 = 1;
    let location = sys::CUmemLocation { kind: DEVICE, id: 0 };
    // SAFETY: plain data, for which zeros are valid.
    let prop = sys::CUmemAllocationProp { kind: 1, location, gpu_direct_rdma: rdma.into(), ..unsafe { std::mem::zeroed() } };
    let access = sys::CUmemAccessDesc { location, flags: 3 };
    let (mut step, mut handle, mut at) = (0, 0, 0);
    // SAFETY: outputs are writable, the range is the one reserved, the properties are complete.
    unsafe {
        cuda.cuMemGetAllocationGranularity(&mut step, &prop, 0)?;
        let len = len.next_multiple_of(step);
        cuda.cuMemCreate(&mut handle, len, &prop, 0)?;
        cuda.cuMemAddressReserve(&mut at, len, 0, 0, 0)?;
        cuda.cuMemMap(at, len, 0, handle, 0)?;
        cuda.cuMemSetAccess(at, len, &access, 1)?;
        Ok((handle, len, at))
    }
}

impl Cuda {
    fn new(place: Place, len: usize) -> cuda_driver::Result<Cuda> {
        let last = cuda_driver::device_count() - 1;
        let context = enter(if place == Place::LastGpu { last } else { 0 });
        let stream = Stream::new(&context)?;
        let (mut at, mut host, mut physical) = (0, std::ptr::null_mut(), (0, 0));
        let cuda = context.enter()?;
        // SAFETY: a context is current, outputs are writable; freed in drop.
        unsafe {
            match place {
                Place::Host => unreachable!("host memory is no CUDA memory"),
                Place::FirstGpu | Place::LastGpu => cuda.cuMemAlloc(&mut at, len)?,
                Place::Pool => cuda.cuMemAllocAsync(&mut at, len, stream.raw())?,
                Place::Mapped | Place::MappedForRdma => {
                    let (handle, mapped, address) = map(&cuda, len, place == Place::MappedForRdma)?;
                    (at, physical) = (address, (handle, mapped));
                }
                Place::Managed => cuda.cuMemAllocManaged(&mut at, len, sys::MEM_ATTACH_GLOBAL)?,
                Place::Pinned => {
                    cuda.cuMemHostAlloc(&mut host, len, sys::HOSTALLOC_PORTABLE)?;
                    at = host as u64;
                }
            }
        }
        drop(cuda);
        stream.finish(LIMIT)?;
        Ok(Cuda { stream, place, at, len, physical })
    }

    fn store(&mut self, bytes: &[u8]) -> cuda_driver::Result<()> {
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            // SAFETY: the allocation holds the bytes; the copy is waited for.
            unsafe { self.stream.host_to_device(self.at + (i * PIECE) as u64, piece.as_ptr(), piece.len()) }?;
            self.stream.finish(LIMIT)?;
        }
        Ok(())
    }

    fn load(&self) -> cuda_driver::Result<Vec<u8>> {
        let mut copy = vec![0; self.len];
        for (i, piece) in copy.chunks_mut(PIECE).enumerate() {
            // SAFETY: as in store.
            unsafe { self.stream.device_to_host(piece.as_mut_ptr(), self.at + (i * PIECE) as u64, piece.len()) }?;
            self.stream.finish(LIMIT)?;
        }
        Ok(copy)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let Ok(cuda) = self.stream.context().enter() else { return };
        // SAFETY: allocated in new, freed once, by the function that belongs to the kind.
        let _ = unsafe {
            match self.place {
                Place::Pool => cuda.cuMemFreeAsync(self.at, self.stream.raw()),
                Place::Mapped | Place::MappedForRdma => {
                    let (handle, len) = self.physical;
                    cuda.cuMemUnmap(self.at, len)
                        .and_then(|()| cuda.cuMemRelease(handle))
                        .and_then(|()| cuda.cuMemAddressFree(self.at, len))
                }
                Place::Pinned => cuda.cuMemFreeHost(self.at as *mut c_void),
                _ => cuda.cuMemFree(self.at),
            }
        };
    }
}

impl Memory {
    pub fn new(place: Place, bytes: Vec<u8>) -> Memory {
        if place == Place::Host || !gpus_wanted() {
            return Memory::Host(bytes);
        }
        let made = Cuda::new(place, bytes.len()).and_then(|mut cuda| cuda.store(&bytes).map(|()| cuda));
        match made {
            Ok(cuda) => Memory::Cuda(cuda),
            Err(e) => panic!("{} bytes of memory of kind {place:?}: {e}", bytes.len()),
        }
    }

    pub fn addr(&self) -> usize {
        match self {
            Memory::Host(bytes) => bytes.as_ptr() as usize,
            Memory::Cuda(cuda) => cuda.at as usize,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Memory::Host(bytes) => bytes.len(),
            Memory::Cuda(cuda) => cuda.len,
        }
    }

    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Memory::Host(bytes) => Cow::Borrowed(bytes),
            Memory::Cuda(cuda) => Cow::Owned(cuda.load().expect("a copy to the host")),
        }
    }
}
