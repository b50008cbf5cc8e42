//! The page codec: what of a page goes over the wire when both sides remember the pages that went before.
//!
//! Sans-IO. Both ends hold a [`PageCache`] of the same size. Within an epoch every page is encoded against what was *committed*, so
//! that the pages of an epoch can be encoded in any order and on any core, and an epoch that is given up leaves both caches as they
//! were; at EPOCH_END both commit the same operations in the same order (DESIGN R2, hazard F18). A session begins with empty caches.
//!
//! The body of a part, little-endian: u32 number of the part within its epoch; u32 count; count u64 page entries as in
//! [`PageBatch`](crate::stream::PageBatch); count u8 encodings; then, in order, the contents:
//!
//! | encoding | contents |
//! |---|---|
//! | 0 none | nothing; the entry's type carries no contents |
//! | 1 zero | nothing; all bytes are zero |
//! | 2 raw | 4096 bytes |
//! | 3 unchanged | nothing; the committed page |
//! | 4 sparse | u16 length, then runs of words that replace those of the base: u16 (first word in bits 8:0, words less one in bits 15:9), 8 bytes a word |
//! | 5 xor | u16 length, an LZ4 block of the page XOR its base |
//! | 6 lz4 | u16 length, an LZ4 block of the page |
//!
//! The base is the committed page, or a page of zeros if there is none.

mod cache;
mod decode;
mod delta;
mod encode;

pub use cache::PageCache;
pub use decode::{PageDecoder, PagesError};
pub use encode::{Counts, Effort, PageEncoder};

use crate::stream::PAGE_SIZE;

/// How a page's contents are encoded, as numbered on the wire.
pub mod encoding {
    /// The entry's type carries no contents.
    pub const NONE: u8 = 0;
    /// All bytes are zero.
    pub const ZERO: u8 = 1;
    /// The page's bytes.
    pub const RAW: u8 = 2;
    /// As committed.
    pub const UNCHANGED: u8 = 3;
    /// Runs of words that differ from the base.
    pub const SPARSE: u8 = 4;
    /// LZ4 of the difference from the base.
    pub const XOR: u8 = 5;
    /// LZ4 of the page.
    pub const LZ4: u8 = 6;
}

/// Bytes before the entries of a part.
const HEAD: usize = 8;
/// Bytes of an entry and its encoding.
const ENTRY: usize = 9;
/// Most entries of one part.
const PART_ENTRIES: usize = 1024;
/// Most pages with contents in one part, so that a part of raw pages stays below a frame's usual size.
pub const PART_PAGES: usize = 62;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

#[cfg(test)]
mod tests;
