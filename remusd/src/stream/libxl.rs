//! The outer stream: libxl's wrapping of the inner one, and the device model's state (libxl-migration-stream, version 2).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::error::StreamError;
use super::item::{Layer, Record};
use super::libxc::put_record;

/// Record types.
pub mod kind {
    /// Last record.
    pub const END: u32 = 0;
    /// The inner stream follows.
    pub const LIBXC_CONTEXT: u32 = 1;
    /// The device model's keys in xenstore.
    pub const EMULATOR_XENSTORE_DATA: u32 = 2;
    /// The device model's own state.
    pub const EMULATOR_CONTEXT: u32 = 3;
    /// End of an epoch in a Remus stream.
    pub const CHECKPOINT_END: u32 = 4;
}

/// Bytes of the stream's header.
pub const HEADER: usize = 16;
/// Longest body accepted: QEMU's state has at most some MiB.
pub const RECORD_MAX: usize = 128 << 20;
const IDENT: u64 = 0x4c69_6278_6c46_6d74;
const VERSION: u32 = 2;
const EMULATOR_QEMU_XEN: u32 = 2;

/// The header that a stream of ours starts with.
#[must_use]
pub fn header() -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER);
    buffer.put_u64(IDENT);
    buffer.put_u32(VERSION);
    buffer.put_u32(0);
    buffer.freeze()
}

/// Checks a header of [`HEADER`] bytes.
///
/// # Errors
/// [`StreamError::Magic`] for other data, [`StreamError::Unsupported`] for another version or a big-endian or legacy stream.
pub fn check_header(bytes: &Bytes) -> Result<(), StreamError> {
    let mut head = bytes.clone();
    if head.len() < HEADER {
        return Err(StreamError::Truncated { within: "the libxl header" });
    }
    let (ident, version, options) = (head.get_u64(), head.get_u32(), head.get_u32());
    if ident != IDENT {
        return Err(StreamError::Magic { expected: "a libxl stream", found: format!("{ident:#x}") });
    }
    if version != VERSION || options != 0 {
        return Err(StreamError::Unsupported {
            feature: format!("libxl stream version {version}, options {options:#x}"),
        });
    }
    Ok(())
}

/// A record's bytes, padded.
#[must_use]
pub fn record(kind: u32, body: &[u8]) -> Bytes {
    let mut buffer = BytesMut::new();
    put_record(&mut buffer, kind, body);
    buffer.freeze()
}

fn emulator(kind: u32, payload: &[u8]) -> Record {
    let mut body = BytesMut::with_capacity(8 + payload.len());
    body.put_u32_le(EMULATOR_QEMU_XEN);
    body.put_u32_le(0);
    body.put_slice(payload);
    Record { layer: Layer::Libxl, kind, body: body.freeze() }
}

/// The state of an upstream QEMU as a record.
#[must_use]
pub fn emulator_context(state: &[u8]) -> Record {
    emulator(kind::EMULATOR_CONTEXT, state)
}

/// An upstream QEMU's xenstore keys (relative to the device model's directory) as a record; `None` without keys, as libxl does.
#[must_use]
pub fn emulator_xenstore(pairs: &[(String, String)]) -> Option<Record> {
    if pairs.is_empty() {
        return None;
    }
    let mut payload = Vec::new();
    for (key, value) in pairs {
        payload.extend_from_slice(key.as_bytes());
        payload.push(0);
        payload.extend_from_slice(value.as_bytes());
        payload.push(0);
    }
    Some(emulator(kind::EMULATOR_XENSTORE_DATA, &payload))
}

/// Checks an emulator record's body: for QEMU upstream, and in pairs of NUL-terminated strings if it is xenstore data.
///
/// # Errors
/// [`StreamError::Malformed`] or [`StreamError::Unsupported`].
pub fn check_emulator(kind: u32, body: &Bytes) -> Result<(), StreamError> {
    let malformed = |reason: &str| StreamError::Malformed { layer: Layer::Libxl, kind, reason: reason.into() };
    if body.len() < 8 {
        return Err(malformed("shorter than its own head"));
    }
    let mut head = body.clone();
    let id = head.get_u32_le();
    if id != EMULATOR_QEMU_XEN {
        return Err(StreamError::Unsupported {
            feature: format!("device model {id} (2, upstream QEMU, is the one supported)"),
        });
    }
    let payload = body.slice(8..);
    if kind == self::kind::EMULATOR_XENSTORE_DATA {
        let strings = payload.iter().filter(|byte| **byte == 0).count();
        if payload.last() != Some(&0) || strings % 2 != 0 {
            return Err(malformed("not pairs of NUL-terminated strings"));
        }
    }
    Ok(())
}
