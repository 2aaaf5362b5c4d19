//! Two comms of device memory TCP that share a queue, of which the receiver neglects the first: `devmem_neighbour receive|send FOLDER unread|held`.
//! unread: no receive is posted there; held: its receives are never consumed. The second must move all of its messages, right. The
//! interface is NCCL_SOCKET_IFNAME's; tests/vm runs it.

use nccl_net_abi::*;
use soft_plugin::EmulatedMemory;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::time::Duration;

const MESSAGES: usize = 200;
const LEN: usize = 256 << 10;
const WINDOW: usize = 4;

fn check(what: &str, result: ncclResult_t) {
    assert_eq!(result, NCCL_SUCCESS, "{what}");
}

fn byte(message: usize, at: usize) -> u8 {
    (message.wrapping_mul(31) ^ at ^ (at >> 8)) as u8
}

fn pause() {
    std::thread::sleep(Duration::from_micros(200));
}

struct Comm {
    raw: *mut c_void,
    memory: EmulatedMemory,
    mhandle: *mut c_void,
}

impl Comm {
    fn new(table: &ncclNet_v7, raw: *mut c_void) -> Comm {
        let (memory, mut mhandle) = (EmulatedMemory::new(LEN * WINDOW).unwrap(), null_mut());
        // SAFETY: a live comm; the memory lives as long as the process.
        let done =
            unsafe { table.regMr.unwrap()(raw, memory.as_ptr().cast(), (LEN * WINDOW) as c_int, NCCL_PTR_CUDA, &mut mhandle) };
        check("regMr", done);
        Comm { raw, memory, mhandle }
    }

    /// A message that is longer than a receive can describe is refused.
    fn refuses_long(&self, table: &ncclNet_v7) {
        let (mut request, mut data) = (null_mut(), self.memory.as_ptr().cast::<c_void>());
        let (mut len, mut tag, mut mhandle) = ((512 << 10) + 1, 7, self.mhandle);
        // SAFETY: a live comm; what is refused touches no memory.
        let posted = unsafe { table.irecv.unwrap()(self.raw, 1, &mut data, &mut len, &mut tag, &mut mhandle, &mut request) };
        assert_eq!(posted, NCCL_INVALID_ARGUMENT);
    }

    fn post(&self, table: &ncclNet_v7, sends: bool, number: usize) -> Option<*mut c_void> {
        let (mut request, mut data) = (null_mut(), self.memory.as_ptr().wrapping_add(number % WINDOW * LEN).cast::<c_void>());
        let (mut len, mut tag, mut mhandle) = (LEN as c_int, 7, self.mhandle);
        // SAFETY: a live comm, and memory that is registered; a place is used again after its request has ended.
        let posted = unsafe {
            match sends {
                true => table.isend.unwrap()(self.raw, data, len, tag, mhandle, &mut request),
                false => table.irecv.unwrap()(self.raw, 1, &mut data, &mut len, &mut tag, &mut mhandle, &mut request),
            }
        };
        check("post", posted);
        (!request.is_null()).then_some(request)
    }
}

fn done(table: &ncclNet_v7, request: *mut c_void) -> bool {
    let (mut done, mut len) = (0, 0);
    // SAFETY: the oldest request of a live comm.
    check("test", unsafe { table.test.unwrap()(request, &mut done, &mut len) });
    done == 1
}

/// Compares what the descriptors of a row describe.
fn compare(handle: &ncclNetDeviceHandle_v7, number: usize) {
    // SAFETY: the emulated GPU's structures are host memory that lives as long as the comm; the receive is done.
    let (entries, base) = unsafe {
        let unpack = handle.handle.cast::<unpackNetDeviceHandle>().read_unaligned();
        let row = number % MAX_REQUESTS;
        let count = (*unpack.meta).cnt[row] as usize;
        let entries = std::slice::from_raw_parts((&raw const (*unpack.meta).mem[row]).cast::<loadMeta>(), count);
        (entries, unpack.bounce_buf.cast::<u8>())
    };
    let mut bytes = 0;
    for entry in entries {
        // SAFETY: the plugin says that these bytes belong to the receive.
        let found = unsafe { std::slice::from_raw_parts(base.add(entry.src_off as usize), entry.len as usize) };
        for (i, found) in found.iter().enumerate() {
            assert_eq!(*found, byte(number, entry.dst_off as usize + i), "message {number}");
        }
        bytes += found.len();
    }
    assert_eq!(bytes, LEN);
}

fn receive(table: &ncclNet_v7, folder: &Path, held: bool) {
    let (mut handles, mut listeners) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (mut handle, mut listener) = ([0u8; NCCL_NET_HANDLE_MAXSIZE], null_mut());
        // SAFETY: 128 bytes.
        check("listen", unsafe { table.listen.unwrap()(0, handle.as_mut_ptr().cast(), &mut listener) });
        handles.extend(handle);
        listeners.push(listener);
    }
    std::fs::write(folder.join("handles.new"), handles).unwrap();
    std::fs::rename(folder.join("handles.new"), folder.join("handles")).unwrap();
    let mut comms = Vec::new();
    for listener in listeners {
        // Kept by the comm.
        let handle = Box::leak(Box::new(ncclNetDeviceHandle_v7 {
            netDeviceType: 0,
            netDeviceVersion: 0,
            handle: null_mut(),
            size: 0,
            needsProxyProgress: 0,
        }));
        let (mut raw, mut pointer) = (null_mut::<c_void>(), &raw mut *handle);
        while raw.is_null() {
            // SAFETY: a live listen comm; the device handle lives as long as the process.
            check("accept", unsafe { table.accept.unwrap()(listener, &mut raw, &mut pointer) });
            pause();
        }
        comms.push((Comm::new(table, raw), pointer));
    }
    comms[0].0.refuses_long(table);
    if held {
        // As many as it takes; none is consumed.
        let mut requests: Vec<_> = (0..MAX_REQUESTS).map_while(|number| comms[0].0.post(table, false, number)).collect();
        for _ in 0..2000 {
            while requests.first().is_some_and(|request| done(table, *request)) {
                requests.remove(0);
            }
            pause();
        }
        println!("held: {} messages have come and are not consumed", MAX_REQUESTS - requests.len());
    } else {
        std::thread::sleep(Duration::from_secs(2));
    }
    let (comm, handle) = &comms[1];
    for number in 0..MESSAGES {
        let request = comm.post(table, false, number).unwrap();
        while !done(table, request) {
            pause();
        }
        // SAFETY: filled by regMr; the comm lives.
        compare(unsafe { &**handle }, number);
        // SAFETY: a receive that is done.
        check("irecvConsumed", unsafe { table.irecvConsumed.unwrap()(comm.raw, 1, request) });
    }
    println!("the neighbour has received {MESSAGES} messages of {LEN} bytes, every byte right");
}

fn send(table: &ncclNet_v7, folder: &Path) {
    let path = folder.join("handles");
    while !path.exists() {
        pause();
    }
    let handles = std::fs::read(path).unwrap();
    let mut comms = Vec::new();
    for handle in handles.chunks(NCCL_NET_HANDLE_MAXSIZE) {
        let (mut handle, mut raw) = (handle.to_vec(), null_mut::<c_void>());
        while raw.is_null() {
            // SAFETY: 128 bytes, at their place between the calls.
            check("connect", unsafe { table.connect.unwrap()(0, handle.as_mut_ptr().cast(), &mut raw, null_mut()) });
            pause();
        }
        comms.push(Comm::new(table, raw));
    }
    // All that the window takes.
    while comms[0].post(table, true, 0).is_some() {}
    let mut requests = std::collections::VecDeque::new();
    for number in 0..MESSAGES {
        while requests.len() == WINDOW {
            match done(table, requests[0]) {
                true => drop(requests.pop_front()),
                false => pause(),
            }
        }
        let place = comms[1].memory.as_ptr().wrapping_add(number % WINDOW * LEN);
        for at in 0..LEN {
            // SAFETY: the place's request has ended.
            unsafe { place.add(at).write(byte(number, at)) };
        }
        requests.push_back(comms[1].post(table, true, number).unwrap());
    }
    for request in requests {
        while !done(table, request) {
            pause();
        }
    }
    println!("sent");
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let table = soft_plugin::device_table();
    println!("{:?}", soft_plugin::prepare_device_memory().expect("device memory TCP"));
    match words[..] {
        ["receive", folder, how] => receive(table, Path::new(folder), how == "held"),
        ["send", folder, _] => send(table, Path::new(folder)),
        _ => panic!("usage: devmem_neighbour receive|send FOLDER unread|held"),
    }
    // The neglected comm stays as it is.
    std::process::exit(0);
}
