//! Numbers and layouts of the protocol. Integers are big-endian.

use std::io::{self, Read, Write};

pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// `NBD_FLAG_FIXED_NEWSTYLE`, `NBD_FLAG_NO_ZEROES`.
pub(super) const HANDSHAKE_FLAGS: u16 = 1 | 2;

/// Transmission flags: what the kernel's client and others may use. Has-flags, flush, FUA, trim, write-zeroes.
pub const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;

/// Largest data of a request in bytes.
pub const MAX_DATA: u32 = 32 << 20;

pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const REPLY_ACK: u32 = 1;
    pub(crate) const REPLY_SERVER: u32 = 2;
    pub(crate) const REPLY_INFO: u32 = 3;
    pub(crate) const REPLY_UNSUPPORTED: u32 = 1 << 31 | 1;
    pub(crate) const REPLY_INVALID: u32 = 1 << 31 | 3;
    pub(crate) const REPLY_UNKNOWN: u32 = 1 << 31 | 6;
    pub(crate) const INFO_EXPORT: u16 = 0;
    pub(crate) const INFO_BLOCK_SIZE: u16 = 3;
}

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Contents.
    Read,
    /// New contents follow.
    Write,
    /// The end of the connection.
    Disconnect,
    /// What is done shall be on stable storage.
    Flush,
    /// The contents are not needed any more.
    Trim,
    /// Zeroes.
    WriteZeroes,
    /// None of these.
    Other(u16),
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is wanted.
    pub command: Command,
    /// `NBD_CMD_FLAG_FUA`: on stable storage before the reply.
    pub fua: bool,
    /// `NBD_CMD_FLAG_NO_HOLE`: keep the space.
    pub no_hole: bool,
    /// Any other flag is set.
    pub unknown_flags: bool,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a reply's header.
pub const REPLY_BYTES: usize = 16;

impl Request {
    /// Reads the header.
    ///
    /// # Errors
    /// The stream's, or `InvalidData` if this is not a request: the connection cannot be used any more.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut raw = [0; REQUEST_BYTES];
        from.read_exact(&mut raw)?;
        let u16_at = |at| u16::from_be_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at| u32::from_be_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        if u32_at(0) != REQUEST_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not an NBD request"));
        }
        let flags = u16_at(4);
        let command = match u16_at(6) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            other => Command::Other(other),
        };
        Ok(Self {
            command,
            fua: flags & 1 != 0,
            no_hole: flags & 2 != 0,
            unknown_flags: flags & !3 != 0,
            cookie: u64_at(8),
            offset: u64_at(16),
            length: u32_at(24),
        })
    }
}

/// A reply's header. `error` is an errno that the protocol knows: EPERM, EIO, ENOMEM, EINVAL, ENOSPC, ESHUTDOWN.
#[must_use]
pub fn reply(error: u32, cookie: u64) -> [u8; REPLY_BYTES] {
    let mut raw = [0; REPLY_BYTES];
    raw[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    raw[4..8].copy_from_slice(&error.to_be_bytes());
    raw[8..].copy_from_slice(&cookie.to_be_bytes());
    raw
}

pub(super) fn option_reply(to: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut raw = Vec::with_capacity(20 + data.len());
    raw.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    raw.extend_from_slice(&option.to_be_bytes());
    raw.extend_from_slice(&kind.to_be_bytes());
    raw.extend_from_slice(&(data.len() as u32).to_be_bytes());
    raw.extend_from_slice(data);
    to.write_all(&raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_specified_layout() {
        let raw = [0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 16, 0];
        let request = Request::read(&mut &raw[..]).unwrap();
        assert_eq!(
            request,
            Request {
                command: Command::WriteZeroes,
                fua: true,
                no_hole: true,
                unknown_flags: false,
                cookie: 0x0102_0304_0506_0708,
                offset: 0x1_0000_0200,
                length: 4096,
            }
        );
        assert!(Request::read(&mut &[0u8; 28][..]).is_err());
        assert_eq!(reply(5, 0x0102), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 1, 2]);
    }
}
