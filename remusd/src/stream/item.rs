//! The pieces of an epoch, as capture yields them, the link carries them and the backup feeds them.

use bytes::Bytes;

/// Bytes of a guest page; the only page size of the stream (`page_shift` 12).
pub const PAGE_SIZE: usize = 4096;

/// The pages of one libxc `PAGE_DATA` record.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PageBatch {
    /// Per page: gfn in bits 51:0, page type in bits 63:60, verbatim as in the record.
    pub entries: Vec<u64>,
    /// `PAGE_SIZE` bytes for each entry whose type carries data, in order.
    pub data: Bytes,
}

impl PageBatch {
    /// Whether a page of this entry's type is followed by its contents: `NOTAB` (0), the page tables 1-4 and pinned 9-c are;
    /// `BROKEN` (d), `XALLOC` (e), `XTAB` (f) are not (libxc-migration-stream, `PAGE_DATA`).
    #[must_use]
    pub fn has_data(entry: u64) -> bool {
        entry >> 60 < 0xd
    }

    /// Number of pages that carry contents.
    #[must_use]
    pub fn data_pages(&self) -> usize {
        self.entries.iter().filter(|e| Self::has_data(**e)).count()
    }

    /// Bytes that this batch holds in memory, for budgets.
    #[must_use]
    pub fn size(&self) -> usize {
        self.entries.len() * 8 + self.data.len()
    }
}

/// Which of the two nested streams a record belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// The inner stream, written by libxenguest: guest memory, vCPU and platform state.
    Libxc,
    /// The outer stream, written by libxl: the device model's state.
    Libxl,
}

/// One record of either stream, unpadded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which stream's numbering `kind` is from.
    pub layer: Layer,
    /// The record's type.
    pub kind: u32,
    /// The record's body without its padding.
    pub body: Bytes,
}

/// What a capture engine yields, in stream order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaptureItem {
    /// Once per session, first: libxc image header, domain header and the static records up to and including
    /// `STATIC_DATA_END`, verbatim.
    Preamble(Bytes),
    /// Pages; while the guest runs (first copy) or stands suspended.
    Pages(PageBatch),
    /// Platform or device-model state of the epoch. The newest set replaces the older ones at activation.
    State(Record),
    /// The engine's part of this epoch is complete (libxc `CHECKPOINT`).
    EndOfEpoch,
}
