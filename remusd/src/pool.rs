//! Buffers that are used again, so that the hot path asks the system for no memory.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Hands out buffers and takes them back when they are dropped. Keeps at most a number of them.
#[derive(Clone, Debug)]
pub struct BufferPool {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
    keep: usize,
}

impl BufferPool {
    /// Keeps at most `keep` unused buffers.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self { free: Arc::new(Mutex::new(Vec::with_capacity(keep))), keep }
    }

    /// An empty buffer with room for at least `capacity` bytes.
    #[must_use]
    pub fn take(&self, capacity: usize) -> Pooled {
        let mut buffer = self.pop();
        buffer.clear();
        buffer.reserve(capacity);
        Pooled { buffer, home: self.clone() }
    }

    /// A buffer of at least `length` bytes of whatever it held before, for a caller that overwrites what it uses: a buffer of a pool
    /// that is only used so is cleared once in its life.
    #[must_use]
    pub fn take_full(&self, length: usize) -> Pooled {
        let mut buffer = self.pop();
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        Pooled { buffer, home: self.clone() }
    }

    /// Makes sure that `count` unused buffers of `length` bytes are there, their memory taken from the system, as far as they are
    /// kept.
    pub fn warm(&self, count: usize, length: usize) {
        let there = self.lock().len();
        let new: Vec<Pooled> = (there..count.min(self.keep)).map(|_| self.fresh(length)).collect();
        drop(new);
    }

    fn fresh(&self, length: usize) -> Pooled {
        // Not zeroes: those would be left to the first use.
        Pooled { buffer: vec![1; length], home: self.clone() }
    }

    fn pop(&self) -> Vec<u8> {
        self.lock().pop().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the unused buffers.
    #[must_use]
    pub fn unused(&self) -> usize {
        self.lock().iter().map(Vec::capacity).sum()
    }
}

/// A buffer of a pool.
#[derive(Debug)]
pub struct Pooled {
    buffer: Vec<u8>,
    home: BufferPool,
}

impl Pooled {
    /// The buffer as shared bytes; it goes back to its pool with the last of them.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Pooled {
    type Target = Vec<u8>;
    fn deref(&self) -> &Vec<u8> {
        &self.buffer
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = self.home.lock();
        if free.len() < self.home.keep {
            free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_of_its_bytes() {
        let pool = BufferPool::new(1);
        let mut buffer = pool.take(1000);
        buffer.extend_from_slice(b"abc");
        let at = buffer.as_ptr();
        let bytes = buffer.freeze();
        let part = bytes.slice(1..);
        drop(bytes);
        assert_eq!(pool.unused(), 0);
        assert_eq!(&part[..], b"bc");
        drop(part);
        assert!(pool.unused() >= 1000);
        let again = pool.take(10);
        assert!(again.is_empty() && again.as_ptr() == at);
        drop(pool.take(10));
        drop(again);
        assert_eq!(pool.free.lock().unwrap().len(), 1, "no more than asked for");
    }
}
