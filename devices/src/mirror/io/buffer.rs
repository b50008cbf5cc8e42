//! Memory that direct I/O accepts.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Direct I/O wants addresses that are multiples of the disk's block size; this fits all.
const ALIGN: usize = 4096;

/// Data shorter than this, in bytes, is held without alignment: a copy when it is written costs less than the memory.
pub const COMPACT: usize = 64 * 1024;

/// Memory of large buffers that nobody uses any more, for the next ones: getting it anew means that the kernel clears it, and takes a page
/// fault for each 4 KiB.
static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Most bytes that are kept so.
const SPARE_BYTES: usize = 4 << 20;

fn spare() -> MutexGuard<'static, Vec<Vec<u8>>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

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
        Self::of(raw, length)
    }

    /// `length` bytes that are to be overwritten as a whole: they are what some buffer has held before.
    #[must_use]
    pub fn stale(length: usize) -> Self {
        if length >= COMPACT {
            let mut spare = spare();
            // Not one that is much larger: it is counted as what it is needed for.
            let fits = |raw: &Vec<u8>| (length + ALIGN - 1..=2 * (length + ALIGN)).contains(&raw.len());
            if let Some(found) = spare.iter().position(fits) {
                return Self::of(spare.swap_remove(found), length);
            }
        }
        Self::new(length)
    }

    fn of(raw: Vec<u8>, length: usize) -> Self {
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

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.raw.len() < COMPACT {
            return;
        }
        let mut spare = spare();
        let kept: usize = spare.iter().map(Vec::len).sum();
        if kept + self.raw.len() <= SPARE_BYTES {
            spare.push(std::mem::take(&mut self.raw));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_buffer_is_zero_whatever_was_held_before_and_a_stale_one_fits() {
        for length in [COMPACT, COMPACT + 512, 1 << 20] {
            let mut old = Buffer::stale(length);
            assert!(old.as_ref().len() == length && is_aligned(old.as_ref()));
            old.as_mut().fill(7);
            drop(old);
            assert!(Buffer::new(length).as_ref().iter().all(|byte| *byte == 0));
            assert_eq!(Buffer::stale(length).as_ref().len(), length);
        }
        let many: Vec<_> = (0..16).map(|_| Buffer::new(1 << 20)).collect();
        drop(many);
        assert!(spare().iter().map(Vec::len).sum::<usize>() <= SPARE_BYTES);
    }
}
