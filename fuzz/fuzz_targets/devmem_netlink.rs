#![no_main]
// Datagrams of netlink: the answers to one request.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((sequence, rest)) = data.split_first() else { return };
    let mut exchange = devmem::Exchange::new(u32::from(*sequence));
    for datagram in rest.chunks(512) {
        if let Some(outcome) = exchange.read(datagram) {
            for kind in 0..8 {
                let (_, bytes) = (outcome.number(kind), outcome.bytes(kind));
                assert!(bytes.is_none_or(|bytes| bytes.len() <= rest.len()));
            }
        }
    }
});
