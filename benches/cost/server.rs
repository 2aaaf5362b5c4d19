//! The passive side of every row: a process of its own, started by this program, that accepts connections and shares one buffer.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use uccl_p2p::config::{Config, PluginChoice};
use uccl_p2p::engine::{Connection, Engine, FifoItem};

/// Bytes of the buffer.
pub const TOTAL: usize = 64 << 20;
/// A notification that ends an echo.
pub const STOP: &[u8] = b"stop";

/// The environment's configuration, for the software plugin and any port.
pub fn config(channels: Option<usize>) -> Config {
    let config = Config::from_env().expect("the environment is understood");
    Config { plugin: PluginChoice::Soft, port: 0, num_channels: channels.or(config.num_channels), ..config }
}

/// Accepts connections and shares one buffer among them. A line on standard input that says `echo` makes it send notifications
/// back until one says stop; the end of standard input ends it.
pub fn serve(channels: Option<usize>) -> ExitCode {
    let engine = Engine::new(config(channels)).expect("engine");
    let buffer = vec![1u8; TOTAL];
    let mr = engine.register(buffer.as_ptr() as usize, TOTAL).expect("register");
    let item = engine.fifo_item(mr, buffer.as_ptr() as usize, TOTAL).expect("item");
    let hex: String = item.to_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let port = engine.metadata().split([':', '?']).nth(1).and_then(|p| p.parse::<u16>().ok()).expect("port");
    println!("{port} {hex}");
    let accepted: Arc<Mutex<Vec<Arc<Connection>>>> = Arc::default();
    let ending = Arc::new(AtomicBool::new(false));
    let acceptor = {
        let (engine, accepted, ending) = (engine.clone(), accepted.clone(), ending.clone());
        std::thread::spawn(move || {
            while !ending.load(Ordering::Acquire) {
                if let Ok(connection) = engine.accept() {
                    let mut all = accepted.lock().expect("no holder panics");
                    all.retain(|c: &Arc<Connection>| c.status().is_ok());
                    all.push(connection);
                }
            }
        })
    };
    for line in std::io::stdin().lock().lines() {
        if !matches!(line.as_deref(), Ok("echo")) {
            continue;
        }
        let initiator = loop {
            if let Some(connection) = accepted.lock().expect("no holder panics").last() {
                break connection.clone();
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        println!("echoing");
        loop {
            match engine.next_notification() {
                Some(n) if n.msg == STOP => break,
                Some(n) => initiator.notify(&n.name, &n.msg).expect("the initiator is there"),
                None => std::thread::yield_now(),
            }
        }
    }
    ending.store(true, Ordering::Release);
    engine.stop_accept();
    engine.shutdown();
    let _ = acceptor.join();
    ExitCode::SUCCESS
}

/// The port of a server and access to its buffer, of the line that it prints.
pub fn parse_address(line: &str) -> (u16, FifoItem) {
    let (port, hex) = line.split_once(' ').expect("port and item");
    let mut bytes = [0; 64];
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).expect("hex"), 16).expect("hex");
    }
    (port.parse().expect("port"), FifoItem::from_bytes(&bytes))
}

/// The server of a row; it ends with this value.
pub struct Server {
    child: Child,
    input: Option<ChildStdin>,
    pub output: BufReader<ChildStdout>,
    /// What [`parse_address`] takes.
    pub address: String,
    port: u16,
    pub item: FifoItem,
}

impl Server {
    pub fn start(channels: Option<usize>) -> Server {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.arg("serve").args(channels.map(|c| c.to_string())).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("server process");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("the server's address");
        let address = line.trim().to_owned();
        let (port, item) = parse_address(&address);
        Server { input: child.stdin.take(), output, address, port, item, child }
    }
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
    pub fn connect(&self, engine: &Engine) -> Arc<Connection> {
        engine.connect("127.0.0.1", "", self.port).expect("connect")
    }
    pub fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("open until the drop");
        writeln!(input, "{line}").and_then(|()| input.flush()).expect("the server reads");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.input.take());
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > until {
                // It may end by itself meanwhile; then there is nothing to kill.
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
