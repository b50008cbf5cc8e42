//! A narrow link between two disk services; for the tests of the services and of the daemon.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Forwards what comes to `at` to the socket `to`, so many bytes per second, for as long as the test runs.
pub fn slow_link(at: &Path, to: PathBuf, rate: u64) {
    let listener = UnixListener::bind(at).unwrap();
    let forward = move |mut from: UnixStream, mut to: UnixStream| {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            std::thread::sleep(Duration::from_micros(count as u64 * 1_000_000 / rate));
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        drop(to.shutdown(std::net::Shutdown::Both));
    };
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let far = UnixStream::connect(&to).unwrap();
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || forward(near, far));
            std::thread::spawn(move || forward(far2, near2));
        }
    });
}
