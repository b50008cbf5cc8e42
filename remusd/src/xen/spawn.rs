//! Starting a child that must not outlive us or inherit more than it is given.
//!
//! Here because what runs between fork and exec needs `unsafe`; nothing of it needs Xen.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Prepares `command` so that the child is in a process group of its own (a terminal's Ctrl-C does not reach it), gets SIGTERM
/// when the *thread* that spawns it ends, ignores SIGPIPE (a write to a closed pipe fails), and inherits, besides stdin, stdout and stderr, only `inherit`, under the same number.
///
/// `inherit` must be above 2 and stay open until the child is spawned. Spawn from a thread that lives as long as the child should.
pub fn isolate(command: &mut Command, inherit: BorrowedFd<'_>) {
    let fd = inherit.as_raw_fd();
    let parent = nix::unistd::getpid();
    command.process_group(0);
    // SAFETY: between fork and exec of a process with threads only async-signal-safe calls are allowed; `in_child` makes
    // a few system calls and getppid, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || in_child(fd, parent));
    }
}

fn in_child(fd: RawFd, parent: nix::unistd::Pid) -> io::Result<()> {
    // SAFETY: plain system calls on numbers; they touch no memory of ours.
    unsafe {
        // CLOSE_RANGE_CLOEXEC rather than closing: std's own pipe, which reports a failed exec, must live until then.
        if libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) != 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        // std has put it back to its default just before.
        if libc::signal(libc::SIGPIPE, libc::SIG_IGN) == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the line above: nobody would tell us.
        if libc::getppid() != parent.as_raw() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}
