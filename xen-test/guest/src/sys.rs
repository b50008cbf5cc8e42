//! The system calls and instructions that need `unsafe`; nothing else here.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap_anonymous, munmap};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Reads the time stamp counter.
#[inline]
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC; it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A zeroed private mapping of its own, populated and locked if possible.
pub(crate) struct Region {
    start: NonNull<c_void>,
    bytes: NonZeroUsize,
    locked: bool,
}

// SAFETY: the mapping belongs to this value alone, is not tied to a thread,
// and is only reached through `&self` and `&mut self`.
unsafe impl Send for Region {}

impl Region {
    /// Maps `bytes` bytes.
    ///
    /// # Errors
    /// The kernel refuses the mapping. Failing to lock it is not an error, see
    /// [`Region::locked`].
    pub(crate) fn new(bytes: NonZeroUsize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice
        // cannot overlap memory that somebody uses.
        let start = unsafe {
            mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE,
            )
        }?;
        // SAFETY: start and length are those of the mapping made above.
        let locked = unsafe { mlock(start, bytes.get()) }.is_ok();
        Ok(Self { start, bytes, locked })
    }

    /// Whether the kernel locked it in memory.
    pub(crate) fn locked(&self) -> bool {
        self.locked
    }

    /// The contents as words.
    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: the mapping is page-aligned, readable, initialised (zeroed)
        // for `bytes` bytes, lives as long as `self`, and is not written
        // through another path while `&self` is held.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes.get() / 8) }
    }

    /// The contents as bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `words`; bytes need no alignment.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes.get()) }
    }

    /// The contents as bytes, to write.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes.get()) }
    }

    /// The contents as words, to write.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`; `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes.get() / 8) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; no slice of it outlives
        // `self`. It cannot fail for a range that is mapped.
        let _ = unsafe { munmap(self.start, self.bytes.get()) };
    }
}

/// Brings an interface up.
pub(crate) fn link_up(name: &str) -> io::Result<()> {
    let s = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut req = ifreq(name)?;
    ioctl(s.as_raw_fd(), libc::SIOCGIFFLAGS, &mut req)?;
    // SAFETY: SIOCGIFFLAGS filled in the flags member of the union.
    let flags = unsafe { req.ifr_ifru.ifru_flags };
    req.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(s.as_raw_fd(), libc::SIOCSIFFLAGS, &mut req)
}

/// Sets the hardware address of an interface that is down.
pub(crate) fn set_mac(name: &str, mac: [u8; 6]) -> io::Result<()> {
    let s = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut req = ifreq(name)?;
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = from.cast_signed();
    }
    req.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    ioctl(s.as_raw_fd(), libc::SIOCSIFHWADDR, &mut req)
}

/// Gives an interface its IPv4 address and prefix length.
pub(crate) fn set_ip4(name: &str, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let s = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut req = ifreq(name)?;
    req.ifr_ifru.ifru_addr = sockaddr4(ip);
    ioctl(s.as_raw_fd(), libc::SIOCSIFADDR, &mut req)?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    req.ifr_ifru.ifru_netmask = sockaddr4(Ipv4Addr::from(mask));
    ioctl(s.as_raw_fd(), libc::SIOCSIFNETMASK, &mut req)
}

/// Adds an IPv6 address to an interface.
pub(crate) fn add_ip6(name: &str, ip: Ipv6Addr, prefix: u8) -> io::Result<()> {
    /// `struct in6_ifreq` of linux/ipv6.h.
    #[repr(C)]
    struct In6Ifreq {
        addr: libc::in6_addr,
        prefix: u32,
        ifindex: libc::c_int,
    }
    let s = socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut req = In6Ifreq {
        addr: libc::in6_addr { s6_addr: ip.octets() },
        prefix: u32::from(prefix),
        ifindex: libc::c_int::try_from(nix::net::if_::if_nametoindex(name)?).map_err(io::Error::other)?,
    };
    ioctl(s.as_raw_fd(), libc::SIOCSIFADDR, &mut req)
}

/// Adds the IPv4 default route.
pub(crate) fn default_route4(gateway: Ipv4Addr) -> io::Result<()> {
    let s = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: rtentry is plain C data (integers and nullable pointers), for
    // which all zeroes is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = sockaddr4(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = sockaddr4(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = sockaddr4(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ioctl(s.as_raw_fd(), libc::SIOCADDRT, &mut route)
}

fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain C data, for which all zeroes is a valid value.
    let mut req: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays for the closing NUL.
    if name.len() >= req.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(req)
}

fn sockaddr4(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // sockaddr_in behind the family: port (2 bytes), address (4 bytes).
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// `T` must be the structure that `request` takes.
fn ioctl<T>(fd: RawFd, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
    // SAFETY: `fd` is open, and every caller above passes the structure its
    // request is documented (netdevice(7), linux/route.h, linux/ipv6.h) to
    // read and write, alive and exclusively borrowed during the call.
    Errno::result(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(arg)) })?;
    Ok(())
}
