//! A narrow link between two disk services; for the tests of the services and of the daemon.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Forwards what comes to `at` to the socket `to`, so many bytes per second in each direction, for as long as the test runs.
/// The rate may be changed; at 0 nothing is forwarded until it is changed again.
pub fn slow_link(at: &Path, to: PathBuf, rate: u64) -> Arc<AtomicU64> {
    let listener = UnixListener::bind(at).unwrap();
    let rate = Arc::new(AtomicU64::new(rate));
    let shared = rate.clone();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let Ok(far) = UnixStream::connect(&to) else { continue };
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let (there, back) = (shared.clone(), shared.clone());
            std::thread::spawn(move || forward(near, far, &there));
            std::thread::spawn(move || forward(far2, near2, &back));
        }
    });
    rate
}

/// Token bucket without a depth: what a wait was too long makes the next one shorter, up to a piece.
fn forward(mut from: UnixStream, mut to: UnixStream, rate: &AtomicU64) {
    let mut buffer = vec![0; 16 << 10];
    let mut free = Instant::now();
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = loop {
            match rate.load(Ordering::Relaxed) {
                // A test that ends takes its threads with it.
                0 => std::thread::sleep(Duration::from_millis(20)),
                bytes => break bytes,
            }
        };
        let piece = Duration::from_micros(count as u64 * 1_000_000 / bytes);
        free = free.max(Instant::now().checked_sub(piece).unwrap_or(free)) + piece;
        std::thread::sleep(free.saturating_duration_since(Instant::now()));
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    drop(to.shutdown(std::net::Shutdown::Both));
}
