//! Nested Xen for tests: a dom0 image from Debian packages, one or two Xen hosts of it under QEMU
//! inside a network namespace of their own, faults on demand, and the scenarios that use them.
//!
//! Start at [`pair::Pair`] to write a scenario.

pub mod bench;
pub mod cli;
pub mod client;
pub mod control;
pub mod host;
pub mod image;
pub mod net;
pub mod pair;
pub mod prepare;
pub mod protection;
pub mod run;
pub mod scenario;
pub mod soak;
pub mod wait;
pub mod witness;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// One line of progress on stderr, with the seconds since the program started.
#[macro_export]
macro_rules! progress {
    ($($arg:tt)*) => { $crate::say(&format!($($arg)*)) };
}

/// Prints one line of progress; see [`progress!`].
pub fn say(line: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    let line = format!("[{:6.1}s] {line}\n", start.elapsed().as_secs_f32());
    eprint!("{line}");
    if let Some(file) = RECORD.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        // The terminal has it; a full disk must not stop a run.
        let _ = file.write_all(line.as_bytes());
    }
}

/// Where [`say`] writes besides stderr.
static RECORD: Mutex<Option<File>> = Mutex::new(None);

/// Keeps all further progress in a file as well, until the next call.
pub fn record_progress(file: &Path) -> std::io::Result<()> {
    let file = File::options().create(true).append(true).open(file)?;
    *RECORD.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    Ok(())
}
