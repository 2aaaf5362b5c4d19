//! Mappings that are no longer used, closed by a thread of the process that ends when there are no more: the driver lets an unmapping wait
//! for work of the application. Knows nothing of what it closes.

use crate::fork::PerProcess;
use parking_lot::Mutex;

/// What is to be closed: dropping it does.
type Closing = Box<dyn Send>;

#[derive(Default)]
struct Queue {
    waiting: Vec<Closing>,
    running: bool,
}

static QUEUE: PerProcess<Mutex<Queue>> = PerProcess::new(Mutex::default);

/// Drops `closing` soon, in another thread; if there can be none, here.
pub(super) fn close(closing: impl Send + 'static) {
    let mut queue = QUEUE.get().lock();
    queue.waiting.push(Box::new(closing));
    if queue.running {
        return;
    }
    match std::thread::Builder::new().name("uccl-closer".into()).spawn(run) {
        Ok(_) => queue.running = true,
        Err(_) => drop(std::mem::take(&mut queue.waiting)),
    }
}

fn run() {
    crate::net::signals::block_all();
    let queue = QUEUE.get();
    loop {
        let mut guard = queue.lock();
        let batch = std::mem::take(&mut guard.waiting);
        if batch.is_empty() {
            guard.running = false;
            return;
        }
        drop(guard);
        drop(batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    struct Tell(std::sync::mpsc::Sender<std::thread::ThreadId>);

    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    #[test]
    fn closing_happens_elsewhere_again_and_again() {
        let (tell, told) = channel();
        for round in 0..200 {
            close(Tell(tell.clone()));
            if round % 7 == 0 {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        for _ in 0..200 {
            let thread = told.recv_timeout(Duration::from_secs(60)).expect("closed");
            assert_ne!(thread, std::thread::current().id());
        }
    }
}
