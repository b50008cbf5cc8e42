//! Frames and their payloads. Integers are little-endian; docs/disks.md has the layouts as a table.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::mirror::core::extent::{Extent, Geometry, GeometryError};
use crate::mirror::core::meta::Role;
use crate::mirror::core::record::{BatchEnd, Payload, Record};
use crate::mirror::core::target::Reply;

/// The one version that this build speaks.
pub(super) const VERSION: u16 = 1;
/// Bytes of a header; the layout is that of remusd's link.
pub(super) const HEADER: usize = 56;
pub(super) const MAGIC: &[u8; 4] = b"RMDK";

/// Names a session. Every frame carries it.
pub(super) type Nonce = u128;

/// First frame of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The disk's name; both sides call it the same.
    pub disk: String,
    /// The sender's host, for messages.
    pub host: String,
}

/// The target's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The sender's host, for messages.
    pub host: String,
    /// What its disk looks like.
    pub geometry: Geometry,
    /// See [`crate::mirror::core::resync`].
    pub lineage: u128,
    /// What its copy is.
    pub role: Role,
    /// Bytes that it can hold.
    pub capacity: u64,
    /// Its marked regions.
    pub marks: Vec<u32>,
}

/// Why a session is declined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RefuseCode {
    /// Another version of the protocol.
    Version = 1,
    /// Another disk.
    Disk = 2,
    /// The copies cannot follow each other.
    Plan = 3,
    /// The target holds a guest's epochs, or is being activated, or has another session.
    Busy = 4,
    /// An internal failure.
    Failed = 5,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Source: opens the session.
    Hello(Hello),
    /// Target: what its copy is.
    Welcome(Welcome),
    /// Either: no session; the stream is closed after it.
    Refuse(RefuseCode, String),
    /// Source: the target's marks are in its log; the copy is of this lineage from now on.
    Start {
        /// Of both copies.
        lineage: u128,
    },
    /// Target: recorded, records may come.
    Started,
    /// Source: the log.
    Record(Record),
    /// Target: watermarks and answers.
    Reply(Reply),
    /// Either: a sign of life.
    Alive,
}

/// What arrived is not a frame of this session. The session ends; nothing of the frame is used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not ours.
    #[error("the peer does not speak the disk protocol (version {VERSION}): install the same remus-disk on both hosts")]
    Foreign,
    /// Damaged on the way.
    #[error("a frame was damaged on the way")]
    Checksum,
    /// Of another session, or one is missing.
    #[error("a frame of another session, or out of order")]
    Sequence,
    /// Too long, too short, unknown.
    #[error("a frame of type {kind:#04x} is malformed: {what}")]
    Malformed {
        /// Its type.
        kind: u16,
        /// What is wrong.
        what: &'static str,
    },
}

pub(super) mod kind {
    pub(crate) const HELLO: u16 = 0x01;
    pub(crate) const WELCOME: u16 = 0x02;
    pub(crate) const REFUSE: u16 = 0x03;
    pub(crate) const START: u16 = 0x04;
    pub(crate) const STARTED: u16 = 0x05;
    pub(crate) const WRITE: u16 = 0x10;
    pub(crate) const ZERO: u16 = 0x11;
    pub(crate) const CHECK: u16 = 0x12;
    pub(crate) const SYNC_DONE: u16 = 0x13;
    pub(crate) const END: u16 = 0x14;
    pub(crate) const APPLIED: u16 = 0x18;
    pub(crate) const DURABLE: u16 = 0x19;
    pub(crate) const CHECKED: u16 = 0x1a;
    pub(crate) const ALIVE: u16 = 0x20;
}

/// Longest payload of a type in bytes; `None` for unknown types.
pub(super) fn limit(kind: u16) -> Option<usize> {
    Some(match kind {
        kind::WRITE => 12 + (32 << 20),
        kind::WELCOME => 16 << 20,
        kind::HELLO | kind::REFUSE => 16 << 10,
        kind::START..=kind::STARTED | kind::ZERO..=kind::END | kind::APPLIED..=kind::CHECKED | kind::ALIVE => 256,
        _ => return None,
    })
}

impl Frame {
    pub(super) fn kind(&self) -> u16 {
        match self {
            Frame::Hello(_) => kind::HELLO,
            Frame::Welcome(_) => kind::WELCOME,
            Frame::Refuse(..) => kind::REFUSE,
            Frame::Start { .. } => kind::START,
            Frame::Started => kind::STARTED,
            Frame::Record(Record::Write { payload: Payload::Data(_), .. }) => kind::WRITE,
            Frame::Record(Record::Write { payload: Payload::Zeroes, .. }) => kind::ZERO,
            Frame::Record(Record::Check { .. }) => kind::CHECK,
            Frame::Record(Record::SyncDone) => kind::SYNC_DONE,
            Frame::Record(Record::End(_)) => kind::END,
            Frame::Reply(Reply::Applied(_)) => kind::APPLIED,
            Frame::Reply(Reply::Durable(_)) => kind::DURABLE,
            Frame::Reply(Reply::Checked { .. }) => kind::CHECKED,
            Frame::Alive => kind::ALIVE,
        }
    }

    /// The payload: what is put before, and data that is not copied.
    pub(super) fn encode(&self) -> (BytesMut, Bytes) {
        let mut out = BytesMut::new();
        let mut data = Bytes::new();
        let put_extent = |out: &mut BytesMut, extent: &Extent| {
            out.put_u64_le(extent.offset);
            out.put_u32_le(extent.length);
        };
        match self {
            Frame::Hello(hello) => {
                put_text(&mut out, &hello.disk);
                put_text(&mut out, &hello.host);
            }
            Frame::Welcome(w) => {
                put_text(&mut out, &w.host);
                out.put_u64_le(w.geometry.size);
                out.put_u32_le(w.geometry.block);
                out.put_u32_le(w.geometry.region);
                out.put_u128_le(w.lineage);
                out.put_u8(w.role as u8);
                out.put_u64_le(w.capacity);
                let mut bits = vec![0u8; (w.geometry.regions() as usize).div_ceil(8)];
                for region in &w.marks {
                    bits[*region as usize / 8] |= 1 << (region % 8);
                }
                out.put_slice(&bits);
            }
            Frame::Refuse(code, text) => {
                out.put_u16_le(*code as u16);
                put_text(&mut out, text);
            }
            Frame::Start { lineage } => out.put_u128_le(*lineage),
            Frame::Record(Record::Write { extent, payload }) => {
                put_extent(&mut out, extent);
                if let Payload::Data(bytes) = payload {
                    data = bytes.clone();
                }
            }
            Frame::Record(Record::Check { id, extent, digest, verify }) => {
                put_extent(&mut out, extent);
                out.put_u64_le(*id);
                out.put_u128_le(*digest);
                out.put_u8(u8::from(*verify));
            }
            Frame::Record(Record::End(end)) => {
                out.put_u64_le(end.batch);
                out.put_u8(u8::from(end.armed));
                out.put_u8(u8::from(end.epoch.is_some()));
                out.put_u64_le(end.epoch.unwrap_or(0));
                out.put_u64_le(end.records);
                out.put_u64_le(end.bytes);
                out.put_u128_le(end.digest);
            }
            Frame::Reply(Reply::Applied(batch) | Reply::Durable(batch)) => out.put_u64_le(*batch),
            Frame::Reply(Reply::Checked { id, same }) => {
                out.put_u64_le(*id);
                out.put_u8(u8::from(*same));
            }
            Frame::Started | Frame::Record(Record::SyncDone) | Frame::Alive => {}
        }
        (out, data)
    }

    /// `data` is the part of a write's payload behind its range, and empty for all others.
    pub(super) fn decode(kind: u16, payload: Bytes, data: Bytes) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        let frame = Self::fields(kind, &mut fields, data).map_err(|what| FrameError::Malformed { kind, what })?;
        if fields.0.is_empty() { Ok(frame) } else { Err(FrameError::Malformed { kind, what: "bytes are left over" }) }
    }

    fn fields(kind: u16, fields: &mut Fields, data: Bytes) -> Result<Self, &'static str> {
        Ok(match kind {
            kind::HELLO => Frame::Hello(Hello { disk: fields.text()?, host: fields.text()? }),
            kind::WELCOME => {
                let host = fields.text()?;
                let geometry = Geometry::new(fields.u64()?, fields.u32()?, fields.u32()?);
                let geometry = geometry.map_err(|_: GeometryError| "an impossible disk")?;
                let lineage = fields.u128()?;
                let role = match fields.u8()? {
                    0 => Role::None,
                    1 => Role::Source,
                    2 => Role::Target,
                    _ => return Err("an unknown role"),
                };
                let capacity = fields.u64()?;
                let bits = fields.take((geometry.regions() as usize).div_ceil(8))?;
                let marks = (0..geometry.regions()).filter(|r| bits[*r as usize / 8] & 1 << (r % 8) != 0).collect();
                Frame::Welcome(Welcome { host, geometry, lineage, role, capacity, marks })
            }
            kind::REFUSE => {
                let code = match fields.u16()? {
                    1 => RefuseCode::Version,
                    2 => RefuseCode::Disk,
                    3 => RefuseCode::Plan,
                    4 => RefuseCode::Busy,
                    _ => RefuseCode::Failed,
                };
                Frame::Refuse(code, fields.text()?)
            }
            kind::START => Frame::Start { lineage: fields.u128()? },
            kind::STARTED => Frame::Started,
            kind::WRITE => {
                let extent = fields.extent()?;
                if data.len() != extent.length as usize {
                    return Err("data and length do not agree");
                }
                Frame::Record(Record::Write { extent, payload: Payload::Data(data) })
            }
            kind::ZERO => Frame::Record(Record::Write { extent: fields.extent()?, payload: Payload::Zeroes }),
            kind::CHECK => {
                let extent = fields.extent()?;
                let (id, digest, verify) = (fields.u64()?, fields.u128()?, fields.bool()?);
                Frame::Record(Record::Check { id, extent, digest, verify })
            }
            kind::SYNC_DONE => Frame::Record(Record::SyncDone),
            kind::END => {
                let batch = fields.u64()?;
                let (armed, has_epoch, epoch) = (fields.bool()?, fields.bool()?, fields.u64()?);
                let (records, bytes, digest) = (fields.u64()?, fields.u64()?, fields.u128()?);
                let epoch = has_epoch.then_some(epoch);
                Frame::Record(Record::End(BatchEnd { batch, epoch, armed, records, bytes, digest }))
            }
            kind::APPLIED => Frame::Reply(Reply::Applied(fields.u64()?)),
            kind::DURABLE => Frame::Reply(Reply::Durable(fields.u64()?)),
            kind::CHECKED => Frame::Reply(Reply::Checked { id: fields.u64()?, same: fields.bool()? }),
            kind::ALIVE => Frame::Alive,
            _ => return Err("an unknown type"),
        })
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    let mut end = text.len().min(4096);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16_le(end as u16);
    out.put_slice(&text.as_bytes()[..end]);
}

struct Fields(Bytes);

macro_rules! number {
    ($name:ident, $type:ty, $get:ident) => {
        fn $name(&mut self) -> Result<$type, &'static str> {
            if self.0.len() < size_of::<$type>() {
                return Err("it is too short");
            }
            Ok(self.0.$get())
        }
    };
}

impl Fields {
    number!(u8, u8, get_u8);
    number!(u16, u16, get_u16_le);
    number!(u32, u32, get_u32_le);
    number!(u64, u64, get_u64_le);
    number!(u128, u128, get_u128_le);

    fn bool(&mut self) -> Result<bool, &'static str> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a flag is neither 0 nor 1"),
        }
    }

    fn take(&mut self, length: usize) -> Result<Bytes, &'static str> {
        if self.0.len() < length {
            return Err("it is too short");
        }
        Ok(self.0.split_to(length))
    }

    fn text(&mut self) -> Result<String, &'static str> {
        let length = usize::from(self.u16()?);
        if length > 4096 {
            return Err("a text is too long");
        }
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| "a text is not UTF-8")
    }

    fn extent(&mut self) -> Result<Extent, &'static str> {
        Ok(Extent::new(self.u64()?, self.u32()?))
    }
}
