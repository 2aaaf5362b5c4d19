#![no_main]
use devmem::agent::{Answer, Request, ANSWER_BYTES};
// The messages between a process and the agent: what is read is written again in the same way.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(request) = Request::decode(data) {
        assert_eq!(Request::decode(&request.encode()), Some(request));
    }
    if let Some(answer) = Answer::decode(data) {
        let bytes = answer.encode();
        assert!(bytes.len() <= ANSWER_BYTES && Answer::decode(&bytes).is_some());
    }
});
