#![no_main]
// The control messages of a received call.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let pieces: Vec<_> = devmem::pieces(data).collect();
    assert!(pieces.len() <= data.len() / 16 + 1);
});
