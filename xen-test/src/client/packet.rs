//! A packet socket on one interface, without `unsafe`.

use std::io::{self, IoSliceMut, PipeReader};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, send,
    setsockopt, socket, sockopt,
};

use super::frame::Mac;

/// Queue of the kernel for us: seconds of traffic, in case we get no CPU.
const QUEUE_BYTES: usize = 64 << 20;
/// `PACKET_OUTGOING` of linux/if_packet.h: our own machine sent it.
const OUTGOING: u8 = 4;

/// A packet socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// No such interface here.
    #[error("no interface {0} with an Ethernet address in this network namespace")]
    NoInterface(String),
    /// The kernel refused; it takes CAP_NET_RAW and CAP_NET_ADMIN.
    #[error("packet socket on {interface}: {what}: {source}")]
    Socket {
        /// The interface.
        interface: String,
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The interface lacks an address to ask from.
    #[error("{0} has no address of the family to probe with")]
    NoAddress(String),
}

/// The addresses of one interface.
#[derive(Debug, Clone)]
pub(super) struct Interface {
    link: LinkAddr,
    pub(super) mac: Mac,
    pub(super) ip4: Vec<Ipv4Addr>,
    pub(super) ip6: Vec<Ipv6Addr>,
}

impl Interface {
    pub(super) fn find(name: &str) -> Result<Self, PacketError> {
        let err = |source: Errno| PacketError::Socket {
            interface: name.into(),
            what: "listing addresses",
            source: source.into(),
        };
        let (mut link, mut ip4, mut ip6) = (None, Vec::new(), Vec::new());
        for it in getifaddrs().map_err(err)?.filter(|i| i.interface_name == name) {
            let Some(address) = it.address else { continue };
            if let Some(a) = address.as_link_addr() {
                link = Some(*a);
            } else if let Some(a) = address.as_sockaddr_in() {
                ip4.push(a.ip());
            } else if let Some(a) = address.as_sockaddr_in6() {
                ip6.push(a.ip());
            }
        }
        let link = link.ok_or_else(|| PacketError::NoInterface(name.into()))?;
        let mac = Mac(link.addr().ok_or_else(|| PacketError::NoInterface(name.into()))?);
        Ok(Self { link, mac, ip4, ip6 })
    }
}

/// A received frame.
pub(super) struct Raw<'a> {
    pub(super) at: Instant,
    /// Sent by this machine, not received.
    pub(super) outgoing: bool,
    pub(super) bytes: &'a [u8],
}

/// Sends and receives whole frames of one interface.
pub(super) struct PacketSocket {
    fd: OwnedFd,
    index: usize,
    buffer: Vec<u8>,
    control: Vec<u8>,
    dropped: u32,
}

impl PacketSocket {
    pub(super) fn open(name: &str, interface: &Interface) -> Result<Self, PacketError> {
        let err = |what| move |e: Errno| PacketError::Socket { interface: name.into(), what, source: e.into() };
        let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .map_err(err("opening"))?;
        setsockopt(&fd, sockopt::RcvBufForce, &QUEUE_BYTES).map_err(err("enlarging its queue"))?;
        setsockopt(&fd, sockopt::ReceiveTimestampns, &true).map_err(err("asking for time stamps"))?;
        setsockopt(&fd, sockopt::RxqOvfl, &1).map_err(err("asking for drop counts"))?;
        // The address names no protocol: the kernel then keeps the socket's.
        bind(fd.as_raw_fd(), &interface.link).map_err(err("binding"))?;
        Ok(Self {
            fd,
            index: interface.link.ifindex(),
            buffer: vec![0; 128 * 1024],
            control: nix::cmsg_space!(nix::sys::time::TimeSpec, u32),
            dropped: 0,
        })
    }

    /// Frames that the kernel could not queue for us so far.
    pub(super) fn dropped(&self) -> u32 {
        self.dropped
    }

    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.fd.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }

    /// Waits for a frame up to `until` (`None`: for ever) or until the other
    /// end of `stop` is dropped, which is the error `Interrupted`. `None` at
    /// the time's end, or for a frame of another interface.
    pub(super) fn receive(&mut self, until: Option<Instant>, stop: &PipeReader) -> io::Result<Option<Raw<'_>>> {
        let wait = until.map_or(PollTimeout::NONE, |t| {
            // Rounded up: rounding down would spin through the last millisecond.
            let left = t.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, wait) {
            Ok(0) | Err(Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let [ours, stopped] = fds.map(|f| f.revents().is_some_and(|r| !r.is_empty()));
        // Frames that are queued come first: a stop must not lose them.
        if stopped && !ours {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let message =
            match recvmsg::<LinkAddr>(self.fd.as_raw_fd(), &mut parts, Some(&mut self.control), MsgFlags::MSG_DONTWAIT)
            {
                Ok(m) => m,
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => return Ok(None),
                Err(e) => return Err(e.into()),
            };
        let mut at = Instant::now();
        for c in message.cmsgs()? {
            match c {
                ControlMessageOwned::ScmTimestampns(t) => {
                    let stamp = SystemTime::UNIX_EPOCH + Duration::from(t);
                    let age = SystemTime::now().duration_since(stamp).unwrap_or(Duration::ZERO);
                    at = at.checked_sub(age).unwrap_or(at);
                }
                ControlMessageOwned::RxqOvfl(n) => self.dropped = n,
                _ => {}
            }
        }
        // Between opening and binding the socket hears every interface.
        let Some(from) = message.address.filter(|a| a.ifindex() == self.index) else { return Ok(None) };
        let len = message.bytes;
        Ok(Some(Raw { at, outgoing: from.pkttype() == OUTGOING, bytes: &self.buffer[..len] }))
    }
}
