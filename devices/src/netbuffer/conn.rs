//! One netlink socket for requests. Blocking: the kernel does a request while it is sent, under the RTNL lock.

use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::error::NetError;
use super::wire::{DUMP_INTERRUPTED, NLMSG_DONE, NLMSG_ERROR, Raw, messages};

/// How often a dump is repeated that the kernel says was interrupted by a change.
const DUMP_TRIES: usize = 10;
/// How long an answer that the kernel owes is waited for, in seconds. It is there when sending returns.
const ANSWER_S: i64 = 5;

/// A socket in the network namespace of the thread that opened it.
pub(super) struct Conn {
    socket: Socket,
    port: u32,
    sequence: u32,
}

impl Conn {
    /// Opens it.
    pub(super) fn open() -> Result<Self, NetError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Short errors with the kernel's words in them.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_S, 0)).map_err(io::Error::from)?;
        tracing::trace!(fd = socket.as_raw_fd(), port, "netlink socket open");
        Ok(Self { socket, port, sequence: 0 })
    }

    /// The port by which notifications name this socket as the one who asked.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetError> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = encode(message, flags, self.sequence);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// Sends one request and waits for its end. Returns what the kernel sent before that.
    ///
    /// # Errors
    /// `Refused` when the kernel says no, naming `link` and `doing`; `Io` when the outcome is unknown.
    pub(super) fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        link: &str,
        doing: &'static str,
    ) -> Result<Vec<Raw>, NetError> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        let mut answers = Vec::new();
        loop {
            for raw in messages(&self.socket.recv_from_full()?.0) {
                if raw.sequence != self.sequence {
                    continue;
                }
                match raw.error() {
                    Some((0, _)) => return Ok(answers),
                    Some((errno, words)) => {
                        return Err(NetError::Refused {
                            link: link.to_owned(),
                            doing,
                            errno,
                            reason: reason(errno, words),
                        });
                    }
                    None => answers.push(raw),
                }
            }
        }
    }

    /// Sends a request for a list and collects it.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
        link: &str,
        doing: &'static str,
    ) -> Result<Vec<Raw>, NetError> {
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(message.clone(), link, doing)? {
                return Ok(found);
            }
        }
        Err(io::Error::other(format!("{doing}: the list kept changing while it was read")).into())
    }

    fn dump_once(
        &mut self,
        message: RouteNetlinkMessage,
        link: &str,
        doing: &'static str,
    ) -> Result<Option<Vec<Raw>>, NetError> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut found, mut whole) = (Vec::new(), true);
        loop {
            for raw in messages(&self.socket.recv_from_full()?.0) {
                if raw.sequence != self.sequence {
                    continue;
                }
                whole &= raw.flags & DUMP_INTERRUPTED == 0;
                match raw.kind {
                    NLMSG_DONE => return Ok(whole.then_some(found)),
                    NLMSG_ERROR => {
                        let (errno, words) = raw.error().unwrap_or((libc::EIO, None));
                        return Err(NetError::Refused {
                            link: link.to_owned(),
                            doing,
                            errno,
                            reason: reason(errno, words),
                        });
                    }
                    _ => found.push(raw),
                }
            }
        }
    }
}

fn reason(errno: i32, words: Option<String>) -> String {
    let os = io::Error::from_raw_os_error(errno);
    match words {
        Some(words) => format!("{os}: {words}"),
        None => os.to_string(),
    }
}

/// The bytes of a request.
pub(super) fn encode(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}
