//! A simulated CUDA driver of two GPUs, of which one or the other is current.

use std::path::PathBuf;
use std::process::Command;

/// The folder of the driver, deleted at the end.
pub struct Driver(PathBuf);

impl Driver {
    pub fn build() -> Driver {
        let folder = std::env::temp_dir().join(format!("strict-foreign-driver-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpus/two_gpus.c");
        let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(folder.join("libcuda.so.1")).arg(source).status();
        assert!(compiled.expect("a C compiler").success());
        Driver(folder)
    }

    /// What a process needs to use it.
    pub fn environment(&self) -> [(&str, &str); 2] {
        [("STRICT_FOREIGN_CUDA", "1"), ("LD_LIBRARY_PATH", self.0.to_str().expect("a name"))]
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs something with a GPU current.
pub fn on_gpu<R>(ordinal: i32, body: impl FnOnce() -> R) -> R {
    let context = cuda_driver::Context::retain(ordinal).expect("context");
    let _current = context.enter().expect("current");
    body()
}
