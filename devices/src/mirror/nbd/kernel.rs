//! The kernel's NBD client, by generic netlink (`linux/nbd-netlink.h`).
//!
//! Netlink and not the older ioctls: a device that was connected so waits for `dead_conn_timeout` when its server dies,
//! and a new server can give it a new socket (hazard F20).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use super::proto::EXPORT_FLAGS;
use crate::mirror::core::extent::Geometry;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;
const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const NLMSG_HEADER: usize = 16;
const GENL_HEADER: usize = 4;

/// The kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No such family.
    #[error("the kernel has no NBD client: load the module nbd")]
    NoNbd,
    /// An errno.
    #[error("the kernel did not {doing} /dev/nbd{index}: {source}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// Which device.
        index: u32,
        /// Why.
        source: io::Error,
    },
    /// The netlink socket.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
}

impl KernelError {
    /// The device has no dead connection (yet) that a new one could replace.
    #[must_use]
    pub fn is_not_dead(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOSPC))
    }

    /// The device is not connected.
    #[must_use]
    pub fn is_not_connected(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENXIO)))
    }
}

/// How a device is connected.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// What the device looks like.
    pub geometry: Geometry,
    /// Written to `/sys/block/nbdN/backend`; another name cannot take the device over.
    pub backend: &'a str,
    /// A request without answer for so long is sent again, on the connection that is there then, in whole seconds. Also
    /// how long requests that a dead server had taken stay away.
    pub request_timeout: Duration,
    /// How long requests wait for a new connection before they fail, in whole seconds.
    pub dead_connection_timeout: Duration,
}

/// An attribute.
fn attribute(kind: u16, value: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn text(kind: u16, value: &str, to: &mut Vec<u8>) {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    attribute(kind, &bytes, to);
}

fn sockets(fd: i32, to: &mut Vec<u8>) {
    let (mut number, mut item) = (Vec::new(), Vec::new());
    attribute(SOCK_FD, &fd.to_ne_bytes(), &mut number);
    attribute(SOCK_ITEM | NLA_F_NESTED, &number, &mut item);
    attribute(ATTR_SOCKETS | NLA_F_NESTED, &item, to);
}

fn message(family: u16, command: u8, version: u8, sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let length = NLMSG_HEADER + GENL_HEADER + attributes.len();
    let mut raw = Vec::with_capacity(length);
    raw.extend_from_slice(&(length as u32).to_ne_bytes());
    raw.extend_from_slice(&family.to_ne_bytes());
    raw.extend_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    raw.extend_from_slice(&sequence.to_ne_bytes());
    raw.extend_from_slice(&0u32.to_ne_bytes());
    raw.extend_from_slice(&[command, version, 0, 0]);
    raw.extend_from_slice(attributes);
    raw
}

fn connect_attributes(settings: &Settings<'_>, fd: i32) -> Vec<u8> {
    let mut raw = Vec::new();
    let number = |kind, value: u64, raw: &mut Vec<u8>| attribute(kind, &value.to_ne_bytes(), raw);
    attribute(ATTR_INDEX, &settings.index.to_ne_bytes(), &mut raw);
    number(ATTR_SIZE_BYTES, settings.geometry.size, &mut raw);
    number(ATTR_BLOCK_SIZE_BYTES, u64::from(settings.geometry.block), &mut raw);
    number(ATTR_TIMEOUT, settings.request_timeout.as_secs(), &mut raw);
    number(ATTR_SERVER_FLAGS, u64::from(EXPORT_FLAGS), &mut raw);
    number(ATTR_DEAD_CONN_TIMEOUT, settings.dead_connection_timeout.as_secs(), &mut raw);
    text(ATTR_BACKEND_IDENTIFIER, settings.backend, &mut raw);
    sockets(fd, &mut raw);
    raw
}

fn reconfigure_attributes(settings: &Settings<'_>, fd: i32) -> Vec<u8> {
    let mut raw = Vec::new();
    attribute(ATTR_INDEX, &settings.index.to_ne_bytes(), &mut raw);
    text(ATTR_BACKEND_IDENTIFIER, settings.backend, &mut raw);
    sockets(fd, &mut raw);
    raw
}

/// A netlink socket that knows the family's number.
pub struct Kernel {
    socket: Socket,
    family: u16,
    sequence: u32,
}

impl Kernel {
    /// Asks for the family.
    ///
    /// # Errors
    /// [`KernelError::NoNbd`] when the module is not loaded.
    pub fn open() -> Result<Self, KernelError> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(10, 0)).map_err(io::Error::from)?;
        let mut kernel = Self { socket, family: 0, sequence: 0 };
        let mut name = Vec::new();
        text(CTRL_ATTR_FAMILY_NAME, "nbd", &mut name);
        let answer = match kernel.call(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, &name) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(KernelError::NoNbd),
            other => other?,
        };
        kernel.family = find_u16(&answer, CTRL_ATTR_FAMILY_ID).ok_or(KernelError::NoNbd)?;
        Ok(kernel)
    }

    /// Sends a request and returns the attributes of the answer, if there is one, once the kernel has acknowledged.
    fn call(&mut self, family: u16, command: u8, version: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        self.socket.send(&message(family, command, version, self.sequence, attributes), 0)?;
        let mut answer = Vec::new();
        loop {
            let datagram = self.socket.recv_from_full()?.0;
            let mut rest = &datagram[..];
            while let Some((head, _)) = rest.split_first_chunk::<NLMSG_HEADER>() {
                let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
                let kind = u16::from_ne_bytes([head[4], head[5]]);
                let sequence = u32::from_ne_bytes([head[8], head[9], head[10], head[11]]);
                let Some(body) = rest.get(NLMSG_HEADER..length) else { break };
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                if kind == NLMSG_ERROR {
                    let number = body.first_chunk().map_or(-libc::EIO, |n| i32::from_ne_bytes(*n));
                    return if number == 0 { Ok(answer) } else { Err(io::Error::from_raw_os_error(-number)) };
                }
                answer = body.get(GENL_HEADER..).unwrap_or_default().to_vec();
            }
        }
    }

    fn request(&mut self, doing: &'static str, index: u32, command: u8, attributes: &[u8]) -> Result<(), KernelError> {
        self.call(self.family, command, 1, attributes).map(drop).map_err(|source| KernelError::Refused {
            doing,
            index,
            source,
        })
    }

    /// Makes `/dev/nbdN` a client of what is at the other end of `socket`.
    ///
    /// # Errors
    /// [`KernelError`]; EBUSY when the device has a server.
    pub fn connect(&mut self, settings: &Settings<'_>, socket: impl AsFd) -> Result<(), KernelError> {
        let attributes = connect_attributes(settings, socket.as_fd().as_raw_fd());
        self.request("connect", settings.index, CMD_CONNECT, &attributes)
    }

    /// Gives a device whose server died a new one. Requests that wait go there.
    ///
    /// # Errors
    /// [`KernelError`]; see [`KernelError::is_not_dead`], [`KernelError::is_not_connected`].
    pub fn reconfigure(&mut self, settings: &Settings<'_>, socket: impl AsFd) -> Result<(), KernelError> {
        let attributes = reconfigure_attributes(settings, socket.as_fd().as_raw_fd());
        self.request("reconnect", settings.index, CMD_RECONFIGURE, &attributes)
    }

    /// Takes the device away from its server.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let mut attributes = Vec::new();
        attribute(ATTR_INDEX, &index.to_ne_bytes(), &mut attributes);
        self.request("disconnect", index, CMD_DISCONNECT, &attributes)
    }
}

fn find_u16(attributes: &[u8], wanted: u16) -> Option<u16> {
    let mut rest = attributes;
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        if kind == wanted {
            return value.first_chunk().map(|v| u16::from_ne_bytes(*v));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reconfigure_request_has_the_bytes_of_the_kernels_header() {
        let settings = Settings {
            index: 3,
            geometry: Geometry::new(1 << 20, 512, 1 << 20).unwrap(),
            backend: "ab",
            request_timeout: Duration::from_secs(10),
            dead_connection_timeout: Duration::from_secs(600),
        };
        let raw = message(0x20, CMD_RECONFIGURE, 1, 7, &reconfigure_attributes(&settings, 5));
        #[rustfmt::skip]
        let want: [u8; 52] = [
            52, 0, 0, 0, 0x20, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0,
            3, 1, 0, 0,
            8, 0, 1, 0, 3, 0, 0, 0,
            7, 0, 10, 0, b'a', b'b', 0, 0,
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 5, 0, 0, 0,
        ];
        assert_eq!(raw, want);
        assert_eq!(find_u16(&[6, 0, 1, 0, 9, 0, 0, 0], CTRL_ATTR_FAMILY_ID), Some(9));
        assert_eq!(connect_attributes(&settings, 5).len(), 8 + 5 * 12 + 8 + 16);
    }
}
