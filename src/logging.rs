//! The log: env_logger on standard error at the level of UCCL_P2P_LOG_LEVEL, unless the process has a logger of its own.

use std::io::Write;
use std::sync::Once;

pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let level = crate::config::log_level();
        // RUST_LOG, where it is set, narrows modules further.
        let env = env_logger::Env::default();
        let mut builder = env_logger::Builder::new();
        builder.filter_level(level);
        if std::env::var_os("RUST_LOG").is_some() {
            builder.parse_env(env);
        }
        builder.format(|out, record| {
            writeln!(out, "{} uccl_p2p[{}] {} {}", out.timestamp_millis(), std::process::id(), record.level(), record.args())
        });
        // An embedding Rust program may have installed its logger first; that one then serves.
        let _ = builder.try_init();
    });
}
