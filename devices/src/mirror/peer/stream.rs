//! Frames on a byte stream. Blocking.

use std::io::{self, Read, Write};

use bytes::{BufMut, Bytes, BytesMut};

use super::frame::{Frame, FrameError, HEADER, MAGIC, Nonce, VERSION, limit};
use crate::mirror::io::{Buffer, COMPACT};

/// Why a stream cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The peer closed it.
    #[error("the other host closed the stream")]
    Eof,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(io::Error),
    /// What came is not of this session.
    #[error("{0}")]
    Frame(#[from] FrameError),
}

impl From<io::Error> for Closed {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof { Closed::Eof } else { Closed::Io(error) }
    }
}

/// The sending half.
pub struct Writer<W> {
    to: W,
    nonce: Nonce,
    sequence: u64,
}

impl<W: Write> Writer<W> {
    /// Frames of the session `nonce`.
    pub fn new(to: W, nonce: u128) -> Self {
        Self { to, nonce, sequence: 0 }
    }

    /// Sends one frame. Whether it is buffered is the stream's choice.
    ///
    /// # Errors
    /// The stream's.
    pub fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let (payload, data) = frame.encode();
        let mut crc = crc32fast::Hasher::new();
        crc.update(&payload);
        crc.update(&data);
        let mut out = BytesMut::with_capacity(HEADER + payload.len());
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(frame.kind());
        out.put_u32_le(0);
        out.put_u32_le((payload.len() + data.len()) as u32);
        // The generation's place in the link's header. A disk's sessions are told apart by their nonce.
        out.put_u64_le(0);
        out.put_u128_le(self.nonce);
        out.put_u64_le(self.sequence);
        out.put_u32_le(crc.finalize());
        let head = crc32fast::hash(&out);
        out.put_u32_le(head);
        out.put_slice(&payload);
        self.sequence += 1;
        self.to.write_all(&out)?;
        self.to.write_all(&data)
    }

    /// Sends what is buffered.
    ///
    /// # Errors
    /// The stream's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The receiving half.
pub struct Reader<R> {
    from: R,
    nonce: Option<Nonce>,
    sequence: u64,
}

impl<R: Read> Reader<R> {
    /// Frames of the session `nonce`, or of the one that the first frame opens.
    pub fn new(from: R, nonce: Option<u128>) -> Self {
        Self { from, nonce, sequence: 0 }
    }

    /// The session, once known.
    pub fn nonce(&self) -> Option<u128> {
        self.nonce
    }

    /// The next frame. Blocks.
    ///
    /// # Errors
    /// [`Closed`]. No memory is reserved for a payload before its header has passed.
    pub fn receive(&mut self) -> Result<Frame, Closed> {
        let mut head = [0; HEADER];
        self.from.read_exact(&mut head)?;
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &head[..4] != MAGIC || u16_at(4) != VERSION {
            return Err(FrameError::Foreign.into());
        }
        if crc32fast::hash(&head[..52]) != u32_at(52) {
            return Err(FrameError::Checksum.into());
        }
        let (kind, length) = (u16_at(6), u32_at(12) as usize);
        let nonce = u128::from(u64_at(24)) | u128::from(u64_at(32)) << 64;
        let strange = u32_at(8) != 0 || u64_at(16) != 0;
        if strange || *self.nonce.get_or_insert(nonce) != nonce || u64_at(40) != self.sequence {
            return Err(FrameError::Sequence.into());
        }
        match limit(kind) {
            None => return Err(FrameError::Malformed { kind, what: "an unknown type" }.into()),
            Some(limit) if length > limit => return Err(FrameError::Malformed { kind, what: "it is too long" }.into()),
            Some(_) => {}
        }
        // Data of a write starts behind 12 bytes of range; it lies as direct I/O wants it only if it has its own buffer.
        let first = length.min(if kind == super::frame::kind::WRITE { 12 } else { usize::MAX });
        let mut payload = vec![0; first];
        self.from.read_exact(&mut payload)?;
        // Held for a while, perhaps: what is small must not take the memory that alignment costs.
        let data = if length - first < COMPACT {
            let mut data = vec![0; length - first];
            self.from.read_exact(&mut data)?;
            Bytes::from(data)
        } else {
            let mut data = Buffer::stale(length - first);
            self.from.read_exact(data.as_mut())?;
            Bytes::from_owner(data)
        };
        let mut crc = crc32fast::Hasher::new();
        crc.update(&payload);
        crc.update(&data);
        if crc.finalize() != u32_at(48) {
            return Err(FrameError::Checksum.into());
        }
        self.sequence += 1;
        Ok(Frame::decode(kind, Bytes::from(payload), data)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mirror::core::extent::{Extent, Geometry};
    use crate::mirror::core::meta::Role;
    use crate::mirror::core::record::{BatchEnd, Payload, Record};
    use crate::mirror::core::target::Reply;
    use crate::mirror::peer::{Hello, RefuseCode, Welcome};

    fn frames() -> Vec<Frame> {
        let extent = Extent::new(0x1000, 512);
        let end = BatchEnd { batch: 3, epoch: Some(9), armed: true, records: 2, bytes: 512, digest: 0xd1 };
        vec![
            Frame::Hello(Hello { disk: "root".into(), host: "a".into() }),
            Frame::Welcome(Welcome {
                host: "b".into(),
                geometry: Geometry::new(9 << 20, 512, 1 << 20).unwrap(),
                lineage: 7,
                role: Role::Target,
                capacity: 64,
                marks: vec![0, 8],
            }),
            Frame::Refuse(RefuseCode::Busy, "no".into()),
            Frame::Start { lineage: 8 },
            Frame::Started,
            Frame::Record(Record::Write { extent, payload: Payload::Data(vec![5; 512].into()) }),
            Frame::Record(Record::Write { extent, payload: Payload::Zeroes }),
            Frame::Record(Record::Check { id: 1, extent, digest: 2, verify: true }),
            Frame::Record(Record::SyncDone),
            Frame::Record(Record::End(end)),
            Frame::Record(Record::End(BatchEnd { epoch: None, armed: false, ..end })),
            Frame::Reply(Reply::Applied(1)),
            Frame::Reply(Reply::Durable(1)),
            Frame::Reply(Reply::Checked { id: 4, same: false }),
            Frame::Alive,
        ]
    }

    fn stream() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), 0x11);
        frames().iter().for_each(|f| writer.send(f).unwrap());
        writer.to
    }

    #[test]
    fn every_frame_comes_out_as_it_went_in() {
        let raw = stream();
        let mut reader = Reader::new(&raw[..], None);
        for frame in frames() {
            assert_eq!(reader.receive().unwrap(), frame);
        }
        assert!(matches!(reader.receive(), Err(Closed::Eof)));
        assert_eq!(reader.nonce(), Some(0x11));
    }

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let mut writer = Writer::new(Vec::new(), 0x0102);
        writer.send(&Frame::Record(Record::Write { extent: Extent::new(512, 512), payload: Payload::Zeroes })).unwrap();
        let raw = writer.to;
        assert_eq!(raw.len(), 68);
        assert_eq!(raw[..16], *b"RMDK\x01\0\x11\0\0\0\0\0\x0c\0\0\0");
        assert_eq!(raw[16..24], [0; 8]);
        assert_eq!(raw[24..26], [2, 1]);
        assert_eq!(raw[40..48], [0; 8]);
        assert_eq!(raw[56..], [0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
    }

    #[test]
    fn a_lost_or_foreign_frame_ends_the_session() {
        let raw = stream();
        let first = HEADER + 4 + 4 + 1;
        let mut reader = Reader::new(&raw[first..], None);
        assert!(matches!(reader.receive(), Err(Closed::Frame(FrameError::Sequence))));
        let mut reader = Reader::new(&raw[..], Some(0x12));
        assert!(matches!(reader.receive(), Err(Closed::Frame(FrameError::Sequence))));
    }

    proptest! {
        #[test]
        fn damage_never_passes(at in 0usize..1000, bit in 0u8..8) {
            let mut raw = stream();
            let at = at % raw.len();
            raw[at] ^= 1 << bit;
            let mut reader = Reader::new(&raw[..], Some(0x11));
            let good = frames().iter().take_while(|f| reader.receive().is_ok_and(|got| got == **f)).count();
            prop_assert!(good < frames().len());
            prop_assert!(reader.receive().is_err() || good < frames().len());
        }
    }
}
