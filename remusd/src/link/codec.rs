//! Frames to bytes and back. Sans-IO; each direction of a session has one [`Encoder`] and one [`Decoder`].
//!
//! Header, 56 bytes, little-endian: magic `RMUS`, u16 version, u16 type, u16 flags (0), u16 reserved (0), u32 payload length,
//! u64 generation, 16 bytes nonce, u64 sequence, u32 CRC-32 of the payload, u32 CRC-32 of the 52 bytes before it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::{
    error::FrameError,
    frame::{Frame, FrameType, VERSION_HANDSHAKE},
    payload,
};
use crate::ids::{Generation, Nonce, SessionKey};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"RMUS";
/// Bytes of a header.
pub const HEADER: usize = 56;
/// The decoder asks for at least this much room when it reads, in bytes.
const READ_AHEAD: usize = 64 * 1024;

/// Turns frames into bytes.
#[derive(Debug)]
pub struct Encoder {
    key: SessionKey,
    version: u16,
    sequence: u64,
}

impl Encoder {
    /// An encoder for the first frame of a session, with the handshake's version.
    #[must_use]
    pub fn new(key: SessionKey) -> Self {
        Self { key, version: VERSION_HANDSHAKE, sequence: 0 }
    }

    /// Later frames have this version.
    pub fn set_version(&mut self, version: u16) {
        self.version = version;
    }

    /// Appends the frame to `out`; on an error `out` is as it was.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] or [`FrameError::Malformed`] if the frame breaks its type's limits.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), FrameError> {
        let start = out.len();
        out.put_bytes(0, HEADER);
        if let Err(error) = payload::put(frame, out) {
            out.truncate(start);
            return Err(error);
        }
        let kind = frame.frame_type();
        let length = out.len() - start - HEADER;
        if length > kind.limit() {
            out.truncate(start);
            return Err(FrameError::TooLong { kind: kind.name(), length: length as u64, limit: kind.limit() as u64 });
        }
        let payload_crc = crc32fast::hash(&out[start + HEADER..]);
        let mut header = &mut out[start..start + HEADER];
        header.put_slice(&MAGIC);
        header.put_u16_le(self.version);
        header.put_u16_le(kind as u16);
        header.put_u16_le(0);
        header.put_u16_le(0);
        header.put_u32_le(length as u32);
        header.put_u64_le(self.key.generation.0);
        header.put_slice(self.key.nonce.0.as_bytes());
        header.put_u64_le(self.sequence);
        header.put_u32_le(payload_crc);
        let header_crc = crc32fast::hash(&out[start..start + HEADER - 4]);
        out[start + HEADER - 4..start + HEADER].copy_from_slice(&header_crc.to_le_bytes());
        self.sequence += 1;
        Ok(())
    }
}

#[derive(Debug)]
struct Header {
    kind: FrameType,
    length: usize,
    payload_crc: u32,
}

/// Turns bytes into frames. After an error it yields that error for ever: a session never gets over one.
#[derive(Debug)]
pub struct Decoder {
    key: Option<SessionKey>,
    version: u16,
    sequence: u64,
    buffer: BytesMut,
    pending: Option<Header>,
    failed: Option<FrameError>,
}

impl Decoder {
    /// A decoder for the side that knows the session already: the one that sent `HELLO`.
    #[must_use]
    pub fn new(key: SessionKey) -> Self {
        Self::with_key(Some(key))
    }

    /// A decoder for the side that learns the session from the first frame, which must be `HELLO`.
    #[must_use]
    pub fn accepting() -> Self {
        Self::with_key(None)
    }

    fn with_key(key: Option<SessionKey>) -> Self {
        Self { key, version: VERSION_HANDSHAKE, sequence: 0, buffer: BytesMut::new(), pending: None, failed: None }
    }

    /// The session that the stream belongs to, once known.
    #[must_use]
    pub fn key(&self) -> Option<SessionKey> {
        self.key
    }

    /// Later frames must have this version.
    pub fn set_version(&mut self, version: u16) {
        self.version = version;
    }

    /// Where to read bytes to, with room for what the frame in progress still needs.
    pub fn buffer(&mut self) -> &mut BytesMut {
        let missing = match &self.pending {
            Some(header) => header.length.saturating_sub(self.buffer.len()),
            None => HEADER.saturating_sub(self.buffer.len()),
        };
        self.buffer.reserve(missing.max(READ_AHEAD));
        &mut self.buffer
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame, `None` if more bytes are needed.
    ///
    /// # Errors
    /// Any [`FrameError`] but `Truncated`.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.try_next().inspect_err(|error| {
            self.failed = Some(error.clone());
            self.buffer = BytesMut::new();
        })
    }

    /// Tells the decoder that the stream has ended.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] if it ended inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.pending.is_some() || !self.buffer.is_empty() { Err(FrameError::Truncated) } else { Ok(()) }
    }

    fn try_next(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.pending.is_none() {
            // A wrong magic is told at once: what a login script prints may be shorter than a header.
            let seen = self.buffer.len().min(MAGIC.len());
            if self.buffer[..seen] != MAGIC[..seen] {
                let mut found = [0; 4];
                found[..seen].copy_from_slice(&self.buffer[..seen]);
                return Err(FrameError::Magic { found });
            }
            if self.buffer.len() < HEADER {
                return Ok(None);
            }
            let raw = self.buffer.split_to(HEADER).freeze();
            self.pending = Some(self.header(&raw)?);
        }
        match self.pending.take() {
            Some(header) if self.buffer.len() >= header.length => {
                let payload = self.buffer.split_to(header.length).freeze();
                let expected = crc32fast::hash(&payload);
                if expected != header.payload_crc {
                    return Err(FrameError::PayloadChecksum {
                        kind: header.kind.name(),
                        found: header.payload_crc,
                        expected,
                    });
                }
                payload::get(header.kind, payload).map(Some)
            }
            unfinished => {
                self.pending = unfinished;
                Ok(None)
            }
        }
    }

    fn header(&mut self, raw: &Bytes) -> Result<Header, FrameError> {
        let expected = crc32fast::hash(&raw[..HEADER - 4]);
        let mut from = &raw[MAGIC.len()..];
        let version = from.get_u16_le();
        let kind = from.get_u16_le();
        let flags = from.get_u16_le();
        let reserved = from.get_u16_le();
        let length = from.get_u32_le() as usize;
        let generation = Generation(from.get_u64_le());
        let mut nonce = [0; 16];
        from.copy_to_slice(&mut nonce);
        let sequence = from.get_u64_le();
        let payload_crc = from.get_u32_le();
        let found = from.get_u32_le();
        if found != expected {
            return Err(FrameError::HeaderChecksum { found, expected });
        }
        if version != self.version {
            return Err(FrameError::Version { found: version, expected: self.version });
        }
        if flags != 0 || reserved != 0 {
            return Err(FrameError::UnknownFlags(flags | reserved));
        }
        let kind = FrameType::from_code(kind).ok_or(FrameError::UnknownType(kind))?;
        let key = SessionKey { generation, nonce: Nonce(Uuid::from_bytes(nonce)) };
        match self.key {
            Some(ours) if ours != key => {
                return Err(FrameError::OtherSession { found: generation.0, expected: ours.generation.0 });
            }
            Some(_) => {}
            None if kind == FrameType::Hello => self.key = Some(key),
            None => return Err(FrameError::NotHello(kind.name())),
        }
        if sequence != self.sequence {
            return Err(FrameError::Sequence { found: sequence, expected: self.sequence });
        }
        self.sequence += 1;
        if length > kind.limit() {
            return Err(FrameError::TooLong { kind: kind.name(), length: length as u64, limit: kind.limit() as u64 });
        }
        Ok(Header { kind, length, payload_crc })
    }
}

#[cfg(test)]
mod tests;
