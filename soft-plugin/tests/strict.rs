//! Strict mode with emulated device memory and random fragments: breaks every rule once, and tests the unpack path.
#![allow(missing_docs)]

mod common;

use common::*;
use nccl_net_abi::*;

const LIMIT: usize = 256 << 10;

fn start() {
    setup(&[
        ("UCCL_TCPX_SOFT_STRICT", "1"),
        ("UCCL_TCPX_EMULATE_DEVICE", "1"),
        ("UCCL_TCPX_SOFT_FRAGMENT", "random"),
        ("NCCL_DYNAMIC_CHUNK_SIZE", "262144"),
    ]);
}

#[repr(align(4096))]
struct Page([u8; 8192]);

fn page() -> Box<Page> {
    Box::new(Page([0x11; 8192]))
}

#[test]
fn properties_offer_device_memory() {
    start();
    // SAFETY: zeroed properties are valid, and live.
    let props = unsafe {
        let mut props: ncclNetProperties_v7 = std::mem::zeroed();
        assert_eq!(soft_plugin::table().getProperties.unwrap()(0, &mut props), 0);
        props
    };
    assert_eq!(props.ptrSupport, NCCL_PTR_HOST | NCCL_PTR_CUDA);
    assert_eq!(props.netDeviceType, NCCL_NET_DEVICE_UNPACK);
}

#[test]
fn accept_needs_a_device_handle() {
    start();
    let (listener, _) = listen();
    let mut comm = std::ptr::null_mut();
    // SAFETY: a live listen comm.
    let code = unsafe { soft_plugin::table().accept.unwrap()(listener, &mut comm, std::ptr::null_mut()) };
    assert_eq!(code, NCCL_INVALID_ARGUMENT);
    close_listen(listener);
}

#[test]
fn the_seventeenth_request_is_an_error() {
    start();
    let mut bytes = [1u8; 4];
    let (sender, receiver) = pair();
    for _ in 0..16 {
        receiver.irecvv(&mut [&mut bytes]).unwrap();
    }
    assert_eq!(receiver.irecvv(&mut [&mut bytes]), Err(NCCL_INTERNAL_ERROR));
    for _ in 0..16 {
        sender.isendv(&[&[1; 4]]).unwrap();
    }
    assert_eq!(sender.isendv(&[&[1; 4]]), Err(NCCL_INTERNAL_ERROR));
}

#[test]
fn testing_a_request_that_is_not_the_oldest_is_an_error() {
    start();
    let (mut a, mut b) = ([0u8; 4], [0u8; 4]);
    let (sender, receiver) = pair();
    let first = receiver.irecvv(&mut [&mut a]).unwrap();
    let second = receiver.irecvv(&mut [&mut b]).unwrap();
    assert_eq!(test(second), Err(NCCL_INTERNAL_ERROR));
    sender.isendv(&[&[1; 4]]).unwrap();
    sender.isendv(&[&[2; 4]]).unwrap();
    assert_eq!(wait(first).map(drop), Ok(()));
    assert_eq!(test(first), Err(NCCL_INTERNAL_ERROR), "already reported");
    assert_eq!(wait(second).map(drop), Ok(()));
}

#[test]
fn consuming_out_of_turn_is_an_error() {
    start();
    let (mut a, mut b) = ([0u8; 4], [0u8; 4]);
    let (sender, receiver) = pair();
    let first = receiver.irecvv(&mut [&mut a]).unwrap();
    let second = receiver.irecvv(&mut [&mut b]).unwrap();
    assert_eq!(receiver.consumed(first), Err(NCCL_INTERNAL_ERROR), "not done");
    sender.isendv(&[&[1; 4]]).unwrap();
    let send = sender.isendv(&[&[2; 4]]).unwrap();
    wait(first).unwrap();
    wait(second).unwrap();
    assert_eq!(receiver.consumed(second), Err(NCCL_INTERNAL_ERROR), "not in order");
    receiver.consumed(first).unwrap();
    receiver.consumed(second).unwrap();
    assert_eq!(receiver.consumed(second), Err(NCCL_INTERNAL_ERROR), "twice");
    assert_eq!(receiver.consumed(send), Err(NCCL_INVALID_ARGUMENT), "of another comm");
}

#[test]
fn device_registrations_are_whole_pages() {
    start();
    let (sender, _receiver) = pair();
    let memory = page();
    let base = memory.0.as_ptr();
    let one = base.wrapping_add(1);
    assert_eq!(reg(sender.0, one, 4096, NCCL_PTR_CUDA), Err(NCCL_INVALID_ARGUMENT));
    assert_eq!(reg(sender.0, base, 4095, NCCL_PTR_CUDA), Err(NCCL_INVALID_ARGUMENT));
    assert_eq!(reg(sender.0, base, 4096, NCCL_PTR_DMABUF), Err(NCCL_INVALID_ARGUMENT));
    let host = reg(sender.0, one, 77, NCCL_PTR_HOST).unwrap();
    let device = reg(sender.0, base, 4096, NCCL_PTR_CUDA).unwrap();
    assert_eq!(sender.isend(base, 4097, device), Err(NCCL_INVALID_ARGUMENT), "outside of the registration");
    assert_eq!(sender.isend(base.wrapping_sub(1), 10, device), Err(NCCL_INVALID_ARGUMENT));
    dereg(sender.0, host);
    dereg(sender.0, device);
}

#[test]
fn sizes_and_counts_are_checked() {
    start();
    let (sender, receiver) = pair();
    let mut data = vec![0u8; LIMIT + 1];
    let base = data.as_mut_ptr();
    let (out, back) = (sender.reg(&data, NCCL_PTR_HOST), receiver.reg(&data, NCCL_PTR_HOST));
    for size in [0, LIMIT + 1, usize::MAX] {
        assert_eq!(sender.isend(base, size, out), Err(NCCL_INVALID_ARGUMENT));
        assert_eq!(receiver.irecv(base, size, back), Err(NCCL_INVALID_ARGUMENT));
    }
    assert_eq!(sender.isendv(&[&data]), Err(NCCL_INVALID_ARGUMENT));
    assert_eq!(sender.isendv(&[]), Err(NCCL_INVALID_ARGUMENT));
    assert_eq!(sender.isendv(&[&[], &[]]), Err(NCCL_INVALID_ARGUMENT));
    assert_eq!(receiver.irecvv(&mut [&mut data]), Err(NCCL_INVALID_ARGUMENT));
    for n in [-1, 0, 2] {
        assert_eq!(receiver.irecv_n(n, base, 10, back), Err(NCCL_INVALID_ARGUMENT));
    }
    // The comms still work.
    let request = receiver.irecv(base, LIMIT, back).unwrap();
    let source = pattern(4, LIMIT);
    sender.isend(source.as_ptr(), LIMIT, out).unwrap();
    assert_eq!(wait(request).map(drop), Ok(()));
    assert!(data[..LIMIT] == source);
    dereg(sender.0, out);
    dereg(receiver.comm, back);
}

#[test]
fn device_messages_are_assembled_from_random_fragments() {
    start();
    let (sender, receiver) = pair();
    let memory = page();
    let mhandle = receiver.reg(&memory.0, NCCL_PTR_CUDA);
    let mut rng = Rng(3);
    let mut shuffled = 0;
    for k in 0..400 {
        let size = match k % 4 {
            0 => LIMIT,
            1 => 1 + rng.below(64),
            _ => 1 + rng.below(LIMIT),
        };
        let data = pattern(k, size);
        // The destination is not mapped: the plugin must not touch it.
        let request = receiver.irecv(16 as *mut u8, LIMIT, mhandle).unwrap();
        let send = sender.isendv(&[&data]).unwrap();
        wait(request).expect("received");
        wait(send).unwrap();
        let entries = receiver.entries(k % MAX_REQUESTS);
        assert!(!entries.is_empty() && entries.len() < MAX_SLOT_ENTRIES);
        shuffled += usize::from(!entries.is_sorted_by_key(|e| e.dst_off));
        assert!(receiver.unpack(k % MAX_REQUESTS, size) == data, "message {k} is damaged");
        receiver.consumed(request).unwrap();
        let base = receiver.unpack.bounce_buf.cast::<u8>();
        // SAFETY: the described bytes are inside the bounce buffer, whose slot is free.
        let poisoned = |e: &loadMeta| unsafe { (e.src_off..e.src_off + e.len).all(|at| *base.add(at as usize) == 0xDB) };
        assert!(entries.iter().all(poisoned), "consumed memory is still readable");
    }
    assert!(shuffled > 100);
    dereg(receiver.comm, mhandle);
}

#[test]
fn slots_follow_the_request_number_for_every_kind() {
    start();
    let (sender, receiver) = pair();
    let memory = page();
    let device = receiver.reg(&memory.0, NCCL_PTR_CUDA);
    let source = sender.reg(&memory.0, NCCL_PTR_CUDA);
    let mut landing = vec![0u8; 9000];
    let host = receiver.reg(&landing, NCCL_PTR_HOST);
    let mut rng = Rng(12);
    for k in 0..100 {
        let size = 1 + rng.below(8000);
        let on_device = rng.below(2) == 0;
        let request = if on_device {
            receiver.irecv(std::ptr::null_mut(), size, device).unwrap()
        } else {
            receiver.irecv(landing.as_mut_ptr(), size, host).unwrap()
        };
        wait(sender.isend(memory.0.as_ptr(), size, source).unwrap()).unwrap();
        wait(request).expect("received");
        if on_device {
            assert!(receiver.unpack(k % MAX_REQUESTS, size) == memory.0[..size]);
        } else {
            assert!(landing[..size] == memory.0[..size]);
        }
        receiver.consumed(request).unwrap();
    }
    dereg(sender.0, source);
    dereg(receiver.comm, device);
    dereg(receiver.comm, host);
}

#[test]
fn a_full_window_of_device_receives_keeps_its_regions_apart() {
    start();
    let (sender, receiver) = pair();
    let memory = page();
    let mhandle = receiver.reg(&memory.0, NCCL_PTR_CUDA);
    let messages: Vec<_> = (0..160).map(|i| pattern(i, LIMIT - i)).collect();
    for window in messages.chunks(16) {
        let receives: Vec<_> = window.iter().map(|_| receiver.irecv(std::ptr::null_mut(), LIMIT, mhandle).unwrap()).collect();
        let sends: Vec<_> = window.iter().map(|m| sender.isendv(&[m]).unwrap()).collect();
        for (recv, _) in receives.iter().zip(window) {
            assert_eq!(wait(*recv).map(drop), Ok(()));
        }
        sends.into_iter().for_each(|s| assert!(wait(s).is_ok()));
        for (slot, (recv, message)) in receives.iter().zip(window).enumerate() {
            assert!(receiver.unpack(slot, message.len()) == *message);
            receiver.consumed(*recv).unwrap();
        }
    }
    dereg(receiver.comm, mhandle);
}

#[test]
fn closing_with_a_device_receive_posted() {
    start();
    let (sender, receiver) = pair();
    let memory = page();
    let mhandle = receiver.reg(&memory.0, NCCL_PTR_CUDA);
    receiver.irecv(std::ptr::null_mut(), LIMIT, mhandle).unwrap();
    sender.isendv(&[&memory.0]).unwrap();
    dereg(receiver.comm, mhandle);
    drop(receiver);
    drop(sender);
}
