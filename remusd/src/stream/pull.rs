//! Incremental parsing: a parser says how many bytes it wants next, and who has them gives exactly those.
//!
//! A blocking reader can so read each record into a buffer of its own, without a second copy; whoever gets bytes in arbitrary
//! pieces uses [`Chunked`].

use bytes::{Bytes, BytesMut};

use super::error::StreamError;

/// An incremental parser.
pub trait Pull {
    /// What it yields.
    type Out;

    /// How many bytes it wants next; 0 after the end.
    fn need(&self) -> usize;

    /// Takes exactly [`need`](Self::need) bytes and appends what they complete to `out`. After an error the parser is of no use.
    ///
    /// # Errors
    /// [`StreamError`] when the bytes are not what the format says.
    fn take(&mut self, bytes: Bytes, out: &mut Vec<Self::Out>) -> Result<(), StreamError>;

    /// What the wanted bytes are part of, for the message about a truncated stream; `None` where the stream may end.
    fn within(&self) -> Option<&'static str>;
}

/// Feeds a [`Pull`] parser from pieces of any size. Holds at most what the parser wants, and only bytes that have come.
pub struct Chunked<P> {
    parser: P,
    held: BytesMut,
}

impl<P: Pull> Chunked<P> {
    /// Wraps a parser.
    pub fn new(parser: P) -> Self {
        Self { parser, held: BytesMut::new() }
    }

    /// The parser.
    pub fn parser(&self) -> &P {
        &self.parser
    }

    #[cfg(test)]
    pub(super) fn held_capacity(&self) -> usize {
        self.held.capacity()
    }

    /// Takes any number of bytes and appends what they complete to `out`. A piece that lies whole in `bytes` is not copied.
    ///
    /// # Errors
    /// [`StreamError`]; what was completed before the fault is in `out`.
    pub fn feed(&mut self, mut bytes: Bytes, out: &mut Vec<P::Out>) -> Result<(), StreamError> {
        loop {
            let need = self.parser.need();
            if need == 0 {
                let extra = self.held.len() + bytes.len();
                return match extra {
                    0 => Ok(()),
                    extra => Err(StreamError::Trailing(extra)),
                };
            }
            if self.held.is_empty() && bytes.len() >= need {
                self.parser.take(bytes.split_to(need), out)?;
                continue;
            }
            if bytes.is_empty() {
                return Ok(());
            }
            let part = bytes.split_to(bytes.len().min(need - self.held.len()));
            self.held.extend_from_slice(&part);
            if self.held.len() == need {
                let whole = self.held.split().freeze();
                self.parser.take(whole, out)?;
            }
        }
    }

    /// Checks that the stream may end here.
    ///
    /// # Errors
    /// [`StreamError::Truncated`].
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.parser.within() {
            _ if !self.held.is_empty() => {
                Err(StreamError::Truncated { within: self.parser.within().unwrap_or("a record's head") })
            }
            Some(within) => Err(StreamError::Truncated { within }),
            None => Ok(()),
        }
    }
}
