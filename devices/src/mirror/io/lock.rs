//! One process for one file.

use std::fs::File;
use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Locks the file for this process alone; `None` while another one has it. A predecessor that is just ending is given
/// `wait` seconds: the lock lasts until its last request has ended, also when it was killed.
///
/// # Errors
/// The kernel's.
pub(super) fn exclusive(mut file: File, wait: u32) -> io::Result<Option<Flock<File>>> {
    let mut tries = u64::from(wait) * 10;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(Some(locked)),
            Err((_, Errno::EWOULDBLOCK)) if tries == 0 => return Ok(None),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(errno.into()),
        };
        tries -= 1;
        // A lock with a time limit does not exist.
        std::thread::sleep(Duration::from_millis(100));
    }
}
