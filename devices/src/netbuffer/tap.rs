//! Notices that a guest has sent something, the moment it does.
//!
//! The kernel has no event for a queue that is no longer empty: the statistics of a qdisc can only be read. But it shows every packet
//! that an interface receives to the packet sockets bound to it, before its ingress filters redirect it to the queue, and a socket
//! wakes who waits for it. What the queue lets go comes back into the interface marked so that neither filters nor packet sockets
//! look at it again (`tc_skip_classify` in the kernel's `__netif_receive_skb_core`, set by `ifb`), so that only what is to be
//! held is seen, and it once.
//!
//! The socket takes one byte of a packet, not of those that go to the guest, and its buffer is the smallest that there is: with a
//! packet or a few in it the kernel copies no more until it is emptied, so that a guest that floods costs a few wake-ups an epoch.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, MsgFlags, bind, recv};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::output::OutputTeller;

/// `PACKET_OUTGOING` of `linux/if_packet.h`.
const OUTGOING: u32 = 4;

/// Reads of a socket that holds a packet or a few, when it is emptied.
const MOST: usize = 64;

/// A program of classic BPF (`linux/filter.h`) that takes one byte of a packet unless this host sends it.
fn incoming_only() -> [SockFilter; 4] {
    /// `SKF_AD_OFF + SKF_AD_PKTTYPE`: what the kernel knows of a packet beside its bytes.
    const PACKET_TYPE: u32 = (-0x1000_i32 + 4).cast_unsigned();
    let code = |bits: u32| u16::try_from(bits).unwrap_or_default();
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let end = code(libc::BPF_RET | libc::BPF_K);
    [
        SockFilter::new(load, 0, 0, PACKET_TYPE),
        SockFilter::new(equal, 0, 1, OUTGOING),
        SockFilter::new(end, 0, 0, 0),
        SockFilter::new(end, 0, 0, 1),
    ]
}

fn address(name: &str) -> io::Result<LinkAddr> {
    let mut links = getifaddrs()?.filter(|it| it.interface_name == name);
    let found = links.find_map(|it| it.address.as_ref().and_then(|address| address.as_link_addr()).copied());
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no network interface {name}")))
}

/// Tells whenever an interface receives something. Ends with the value.
pub(super) struct Tap {
    socket: Arc<UdpSocket>,
    task: tokio::task::JoinHandle<()>,
}

impl Tap {
    /// Watches the interface of this name, of this thread's network namespace, from a task of this thread's runtime.
    ///
    /// # Errors
    /// The kernel's: it takes `CAP_NET_RAW`, and the interface has to be there.
    pub(super) fn open(name: &str, teller: OutputTeller) -> io::Result<Self> {
        let address = address(name)?;
        let every = Protocol::from(i32::from(u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW.nonblocking().cloexec(), Some(every))?;
        socket.attach_filter(&incoming_only())?;
        // The kernel makes it the least that it allows.
        socket.set_recv_buffer_size(1)?;
        // The address names no protocol: the kernel then keeps the socket's.
        bind(socket.as_raw_fd(), &address)?;
        // Only waited for: of tokio's sockets any does.
        let socket = Arc::new(UdpSocket::from_std(std::net::UdpSocket::from(OwnedFd::from(socket)))?);
        let waiting = socket.clone();
        let task = tokio::spawn(async move {
            while waiting.readable().await.is_ok() {
                // Ready again only with the next packet: those that are there stay until the epoch is closed.
                let none = || Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock));
                let _ = waiting.try_io(Interest::READABLE, none);
                teller.tell();
            }
        });
        let tap = Self { socket, task };
        // Until it was bound it saw every interface.
        tap.empty();
        Ok(tap)
    }

    /// Forgets what it has seen; the next packet is told. Never blocks.
    pub(super) fn empty(&self) {
        let mut byte = [0];
        for _ in 0..MOST {
            // An error is that of an interface that was taken down, told once in place of a packet.
            if recv(self.socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) == Err(Errno::EAGAIN) {
                return;
            }
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
