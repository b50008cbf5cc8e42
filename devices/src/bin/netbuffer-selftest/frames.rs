//! Marked Ethernet frames, sent from the guest's side and watched for on the bridge.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Begins the payload of every marked frame.
const MAGIC: &[u8; 8] = b"selftest";
/// How long a frame that should come may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The kinds of frames that are tried. A VLAN tag comes before its inner type.
pub(crate) const TYPES: [(&str, &[u8]); 7] = [
    ("IPv4", &[0x08, 0x00]),
    ("ARP", &[0x08, 0x06]),
    ("IPv6", &[0x86, 0xdd]),
    ("VLAN", &[0x81, 0x00, 0x00, 0x05, 0x08, 0x00]),
    ("LLDP", &[0x88, 0xcc]),
    ("MPLS", &[0x88, 0x47]),
    ("unassigned", &[0x88, 0xb5]),
];
/// The type used where any will do.
pub(crate) const PLAIN: &[u8] = TYPES[6].1;

/// What a marked frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark {
    /// Free for the check: an epoch, a phase of it, an index into `TYPES`.
    pub tag: u32,
    /// Counts the frames of one check.
    pub seq: u32,
}

fn link_addr(interface: &str) -> Result<LinkAddr, String> {
    nix::ifaddrs::getifaddrs()
        .map_err(|e| e.to_string())?
        .filter(|a| a.interface_name == interface)
        .find_map(|a| a.address.and_then(|a| a.as_link_addr().copied()))
        .ok_or_else(|| format!("no link address of {interface}"))
}

/// Sends marked frames out of one interface. Made in the namespace of that interface, used in any.
pub(crate) struct Sender {
    socket: OwnedFd,
    to: LinkAddr,
}

impl Sender {
    pub(crate) fn new(interface: &str) -> Result<Self, String> {
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).map_err(|e| e.to_string())?;
        // Were it held by the buffer itself and not a copy, what was sent would soon fill the socket.
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(10, 0)).map_err(|e| e.to_string())?;
        Ok(Self { socket, to: link_addr(interface)? })
    }

    /// One broadcast frame of `len` bytes of payload at least.
    pub(crate) fn send(&self, kind: &[u8], mark: Mark, len: usize) -> Result<(), String> {
        let mut frame = vec![0xff; 6];
        frame.extend([0x02, 0, 0, 0, 0, 0x77]);
        frame.extend(kind);
        frame.extend(MAGIC);
        frame.extend(mark.tag.to_be_bytes());
        frame.extend(mark.seq.to_be_bytes());
        frame.resize(frame.len().max(len), 0);
        match sendto(self.socket.as_raw_fd(), &frame, &self.to, MsgFlags::empty()) {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("send a frame: {e}")),
        }
    }
}

#[derive(Default)]
struct Seen {
    marks: Vec<Mark>,
    stop: bool,
}

/// Collects the marks of frames that arrive on one interface, in order.
pub(crate) struct Observer {
    seen: Arc<(Mutex<Seen>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Observer {
    pub(crate) fn new(interface: &str) -> Result<Self, String> {
        let index = link_addr(interface)?.ifindex();
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .map_err(|e| e.to_string())?;
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).map_err(|e| e.to_string())?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000)).map_err(|e| e.to_string())?;
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let shared = seen.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            loop {
                match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
                    Ok((len, Some(from))) if from.ifindex() == index => {
                        if let Some(mark) = mark_in(&buffer[..len]) {
                            shared.0.lock().unwrap().marks.push(mark);
                            shared.1.notify_all();
                        }
                    }
                    Ok(_) => {}
                    Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                        if shared.0.lock().unwrap().stop {
                            return;
                        }
                    }
                    Err(e) => panic!("observer: {}", io::Error::from(e)),
                }
            }
        });
        Ok(Self { seen, thread: Some(thread) })
    }

    pub(crate) fn marks(&self) -> Vec<Mark> {
        self.seen.0.lock().unwrap().marks.clone()
    }

    /// Waits until `enough` says that what has arrived is enough.
    pub(crate) fn wait(&self, what: &str, enough: impl Fn(&[Mark]) -> bool) -> Result<Vec<Mark>, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.0.lock().unwrap();
        while !enough(&seen.marks) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("{what}: only {} frames after {PATIENCE:?}", seen.marks.len()));
            }
            seen = self.seen.1.wait_timeout(seen, left).unwrap().0;
        }
        Ok(seen.marks.clone())
    }

    pub(crate) fn wait_for(&self, n: usize) -> Result<Vec<Mark>, String> {
        self.wait(&format!("waiting for {n}"), |marks| marks.len() >= n)
    }

    pub(crate) fn forget(&self) {
        self.seen.0.lock().unwrap().marks.clear();
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.seen.0.lock().unwrap().stop = true;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The kernel takes a VLAN tag out of what a packet socket sees, so the mark is looked for.
fn mark_in(frame: &[u8]) -> Option<Mark> {
    let at = frame.windows(MAGIC.len()).take(32).position(|w| w == MAGIC)? + MAGIC.len();
    let word = |at: usize| Some(u32::from_be_bytes(frame.get(at..at + 4)?.try_into().ok()?));
    Some(Mark { tag: word(at)?, seq: word(at + 4)? })
}
