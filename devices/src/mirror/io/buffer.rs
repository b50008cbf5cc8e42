//! Memory that direct I/O accepts.

/// Direct I/O wants addresses that are multiples of the disk's block size; this fits all.
const ALIGN: usize = 4096;

/// Data shorter than this, in bytes, is held without alignment: a copy when it is written costs less than the memory.
pub const COMPACT: usize = 64 * 1024;

/// Bytes at an address that is a multiple of 4096.
pub struct Buffer {
    raw: Vec<u8>,
    at: usize,
    length: usize,
}

impl Buffer {
    /// `length` zero bytes.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let raw = vec![0; length + ALIGN - 1];
        // The memory of a vector that is never resized does not move.
        let at = raw.as_ptr().align_offset(ALIGN);
        Self { raw, at, length }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.as_mut().copy_from_slice(bytes);
        buffer
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.raw[self.at..self.at + self.length]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.at..self.at + self.length]
    }
}

/// Whether direct I/O takes these bytes as they lie.
#[must_use]
pub(super) fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(ALIGN) == 0
}
