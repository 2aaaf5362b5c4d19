//! Registrations. The plugin finds them by address, as long as they are not dropped: memory that is registered again after it was freed
//! and came back meets the old one. Dropping one ends all access of closed comms to it, unless the receive manager does not.

use crate::gpu::Gpu;
use crate::memory::{mapped, PAGE};
use crate::rules::{counters, down, lock, up, violation};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::Mutex;

pub(super) struct Mr {
    dev: usize,
    base: usize,
    size: usize,
    device: bool,
    in_flight: usize,
    /// It was dropped, and the receive manager has it nevertheless.
    stays: bool,
}

static LIVE: Mutex<Option<HashMap<usize, Mr>>> = Mutex::new(None);

/// Registers memory for a NIC; the number is the mhandle.
pub(super) fn register(dev: usize, gpu: Option<&'static Gpu>, base: usize, size: usize, device: bool) -> usize {
    if device {
        if base % PAGE != 0 || size % PAGE != 0 || size == 0 {
            violation!("regMr of {size} bytes at {base:#x}: not whole pages");
        }
        match gpu {
            Some(gpu) => gpu.check("regMr", base, size),
            None if mapped(base, size) => {}
            None => violation!("regMr of {size} bytes at {base:#x}: reaches beyond mapped memory"),
        }
    }
    let mut live = lock(&LIVE);
    let live = live.get_or_insert_default();
    let meets = |m: &&Mr| device && m.device && m.dev == dev && m.base < base + size && base < m.base + m.size;
    if let Some(old) = live.values().find(meets) {
        violation!("{size} bytes at {base:#x} meet the registration of {} at {:#x}, which was not dropped", old.size, old.base);
    }
    let c = counters();
    up(&c.registrations, Some(&c.registrations_most), 1);
    up(&c.registrations_ever, None, 1);
    // Numbers are never used again.
    let id = c.registrations_ever.load(Ordering::Acquire) as usize * 16;
    live.insert(id, Mr { dev, base, size, device, in_flight: 0, stays: false });
    id
}

/// Whether it is a registration of device memory, of which the receive manager knows.
pub(super) fn is_device(id: usize) -> bool {
    lock(&LIVE).get_or_insert_default().get(&id).is_some_and(|mr| mr.device)
}

/// `ends`: the receive manager drops it, too.
pub(super) fn deregister(dev: usize, id: usize, ends: bool) {
    let mut live = lock(&LIVE);
    let Some(mr) = live.get_or_insert_default().get_mut(&id).filter(|mr| !mr.stays) else {
        violation!("deregMr of {id:#x}, which is not registered");
    };
    if mr.dev != dev {
        violation!("deregMr of {id:#x} with NIC {dev}: it belongs to NIC {}", mr.dev);
    }
    if mr.in_flight > 0 {
        violation!("deregMr of {} bytes at {:#x} with {} requests in flight", mr.size, mr.base, mr.in_flight);
    }
    mr.stays = true;
    if ends {
        live.get_or_insert_default().remove(&id);
    }
    down(&counters().registrations, 1);
}

/// Counts a request that uses the range of a registration.
pub(super) fn begin(call: &str, dev: usize, id: usize, data: usize, len: usize) {
    let mut live = lock(&LIVE);
    let Some(mr) = live.get_or_insert_default().get_mut(&id).filter(|mr| !mr.stays) else {
        violation!("{call} with registration {id:#x}, which does not exist (or was dropped)");
    };
    if mr.dev != dev {
        violation!("{call} on NIC {dev} with a registration of NIC {}", mr.dev);
    }
    if !mr.device {
        violation!("{call} of {len} bytes of host memory");
    }
    if data < mr.base || data + len > mr.base + mr.size {
        violation!("{call} of {len} bytes at {data:#x}: outside of the registration of {} at {:#x}", mr.size, mr.base);
    }
    mr.in_flight += 1;
}

/// A request has ended, or its comm is closed.
pub(super) fn end(id: usize) {
    if let Some(mr) = lock(&LIVE).get_or_insert_default().get_mut(&id) {
        mr.in_flight -= 1;
    }
}

/// Runs `body` if all of these registrations exist; none is dropped meanwhile.
pub(super) fn while_registered(ids: &[usize], body: impl FnOnce()) {
    let mut live = lock(&LIVE);
    let live = live.get_or_insert_default();
    if ids.iter().all(|id| live.contains_key(id)) {
        body();
    }
}
