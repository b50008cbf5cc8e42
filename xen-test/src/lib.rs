//! Nested Xen for tests: a dom0 image from Debian packages, one or two Xen hosts of it under QEMU
//! inside a network namespace of their own, faults on demand, and the scenarios that use them.
//!
//! Start at [`pair::Pair`] to write a scenario.

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
pub mod wait;

/// One line of progress on stderr, with the seconds since the program started.
#[macro_export]
macro_rules! progress {
    ($($arg:tt)*) => { $crate::say(&format!($($arg)*)) };
}

/// Prints one line of progress; see [`progress!`].
pub fn say(line: &str) {
    use std::sync::OnceLock;
    use std::time::Instant;
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    eprintln!("[{:6.1}s] {line}", start.elapsed().as_secs_f32());
}
