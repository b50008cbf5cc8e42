//! Sets up the guest's interface.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use super::{BootError, NetConfig};
use crate::sys;

/// Waits for the interface and gives it its addresses.
pub(super) fn set_up(config: &NetConfig, timeout: Duration) -> Result<(), BootError> {
    let name = config.interface.as_str();
    let err = |what| move |source| BootError::Net { name: name.into(), what, source };
    wait_for(name, timeout).map_err(err("waiting for it to appear"))?;
    // The address is ours by order: no detection of duplicates (it delays and
    // needs an answer-free second), no router's ideas.
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("autoconf", "0")] {
        // A kernel without IPv6 has no such file; add_ip6 then says so.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{key}"), value);
    }
    if let Some(mac) = config.mac {
        sys::set_mac(name, mac).map_err(err("setting its hardware address"))?;
    }
    sys::link_up("lo").map_err(err("bringing lo up"))?;
    sys::set_ip4(name, config.ip.0, config.ip.1).map_err(err("setting its IPv4 address"))?;
    sys::link_up(name).map_err(err("bringing it up"))?;
    sys::add_ip6(name, config.ip6.0, config.ip6.1).map_err(err("adding its IPv6 address"))?;
    if let Some(gateway) = config.gateway {
        sys::default_route4(gateway).map_err(err("adding the default route"))?;
    }
    Ok(())
}

/// Waits for a link by the kernel's own announcements.
fn wait_for(name: &str, timeout: Duration) -> io::Result<()> {
    let links = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(links.as_raw_fd(), &NetlinkAddr::new(0, libc::RTMGRP_LINK as u32))?;
    let deadline = Instant::now() + timeout;
    let mut buffer = vec![0; 16 * 1024];
    // Bound first, looked up second: an announcement in between is not lost.
    while !Path::new("/sys/class/net").join(name).exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::ETIMEDOUT.into());
        }
        let mut fds = [PollFd::new(links.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, wait) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        match recv(links.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // Overrun: something was announced, look again.
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
