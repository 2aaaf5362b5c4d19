#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| uccl_p2p::fuzz_api::stream(data));
