//! Emulated device memory with fixed-size fragments, without strict mode.
#![allow(missing_docs)]

mod common;

use common::*;
use nccl_net_abi::*;

#[test]
fn fixed_fragments_are_contiguous_and_consumed_memory_is_untouched() {
    setup(&[("UCCL_TCPX_EMULATE_DEVICE", "1"), ("UCCL_TCPX_SOFT_FRAGMENT", "4096")]);
    let (sender, receiver) = pair();
    let memory = vec![0u8; 4096];
    let mhandle = receiver.reg(&memory, NCCL_PTR_CUDA);
    let data = pattern(1, 100_000);
    let request = receiver.irecv(std::ptr::null_mut(), 512 << 10, mhandle).unwrap();
    wait(sender.isendv(&[&data]).unwrap()).unwrap();
    assert_eq!(wait(request), Ok(100_000));
    let entries = receiver.entries(0);
    assert_eq!(entries.len(), 25);
    for (i, e) in entries.iter().enumerate() {
        assert_eq!((e.dst_off, e.src_off - entries[0].src_off), (i as u64 * 4096, i as u32 * 4096));
        assert_eq!(e.len, if i == 24 { 100_000 - 24 * 4096 } else { 4096 });
    }
    receiver.consumed(request).unwrap();
    assert!(receiver.unpack(0, 100_000) == data);
    dereg(receiver.comm, mhandle);
}

#[test]
fn a_comm_without_a_device_handle_receives_host_memory_only() {
    setup(&[("UCCL_TCPX_EMULATE_DEVICE", "1"), ("UCCL_TCPX_SOFT_FRAGMENT", "4096")]);
    let (listener, mut handle) = listen();
    let sender = connect(&mut handle);
    let mut comm = std::ptr::null_mut();
    until("accept", || {
        // SAFETY: a live listen comm.
        assert_eq!(unsafe { soft_plugin::table().accept.unwrap()(listener, &mut comm, std::ptr::null_mut()) }, NCCL_SUCCESS);
        (!comm.is_null()).then_some(())
    });
    let unpack = unpackNetDeviceHandle { meta: std::ptr::null_mut(), bounce_buf: std::ptr::null_mut(), head: 0 };
    let receiver = Receiver { comm, unpack };
    let mut landing = vec![0u8; 4096];
    let device = receiver.reg(&landing, NCCL_PTR_CUDA);
    assert_eq!(receiver.irecv(landing.as_mut_ptr(), 4096, device), Err(NCCL_INVALID_ARGUMENT));
    dereg(receiver.comm, device);
    let request = receiver.irecvv(&mut [&mut landing]).unwrap();
    sender.isendv(&[&[5; 4096]]).unwrap();
    assert_eq!(wait(request), Ok(4096));
    assert!(landing.iter().all(|b| *b == 5));
    close_listen(listener);
}
