//! The ledger's client: asks for one entry after the other, over one TCP connection that must survive everything.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::journal::Journal;

/// Asks for the next entry as soon as the one before is acknowledged, on a thread of its own, until told to stop or dropped.
pub struct LedgerClient {
    stream: TcpStream,
    acknowledged: Journal<u64>,
    stop: Arc<AtomicBool>,
}

impl LedgerClient {
    /// Connects, and asks for entry `first`.
    ///
    /// # Errors
    /// No connection within `timeout`.
    pub fn connect(to: SocketAddr, first: u64, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_nodelay(true)?;
        let acknowledged = Journal::new();
        let stop = Arc::new(AtomicBool::new(false));
        let (connection, theirs, stopped) = (stream.try_clone()?, acknowledged.clone(), Arc::clone(&stop));
        thread::Builder::new().name("ledger".into()).spawn(move || {
            let why = ask(&connection, first, &theirs, &stopped);
            theirs.end(why.err().unwrap_or_else(|| "stopped".into()));
        })?;
        Ok(Self { stream, acknowledged, stop })
    }

    /// The newest entry that was acknowledged, 0 before the first.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.read(|all| all.last().copied().unwrap_or(0))
    }

    /// Waits until entry `n` is acknowledged; `None` if it is not within `timeout`, or the connection has ended.
    pub fn wait_for(&self, n: u64, timeout: Duration) -> Option<u64> {
        self.acknowledged.wait(Instant::now() + timeout, |all| all.last().copied().filter(|last| *last >= n))
    }

    /// Why the connection ended; `None` while it lives.
    pub fn ended(&self) -> Option<String> {
        self.acknowledged.ended()
    }

    /// Asks for no more entries, waits for the last answer, and returns the newest that was acknowledged.
    ///
    /// # Errors
    /// Why the connection had ended before, or that no answer came within `timeout`.
    pub fn finish(&self, timeout: Duration) -> Result<u64, String> {
        self.stop.store(true, Ordering::Relaxed);
        // An end wakes whoever waits for an entry that cannot come any more.
        self.acknowledged.wait(Instant::now() + timeout, |_| None::<()>);
        match self.ended().as_deref() {
            Some("stopped") => Ok(self.acknowledged()),
            Some(why) => Err(why.to_owned()),
            None => Err(format!("no answer within {timeout:?} after entry {}", self.acknowledged())),
        }
    }
}

impl Drop for LedgerClient {
    fn drop(&mut self) {
        // Ends the reader; a connection that is gone already is fine.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn ask(mut stream: &TcpStream, first: u64, acknowledged: &Journal<u64>, stop: &AtomicBool) -> Result<(), String> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    for n in first.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        stream.write_all(format!("{n}\n").as_bytes()).map_err(|e| e.to_string())?;
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) => return Err("the guest closed the connection".into()),
            Ok(_) if line.trim() == n.to_string() => acknowledged.push(n),
            Ok(_) => return Err(format!("entry {n} was answered with {:?}", line.trim())),
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(())
}
