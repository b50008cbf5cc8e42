//! The digest of an epoch over its decoded contents (DESIGN R7, hazard F18).
//!
//! Taken by the primary over what it captured, by the backup over what it will apply, so that a fault of codec, cache,
//! transport or staging is seen before the epoch is acknowledged.

use xxhash_rust::xxh3::Xxh3;

use super::item::{Layer, PageBatch, Record};

/// Digest of one epoch: XXH3, 128 bits. Detects faults, not attackers: the transport authenticates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochDigest(pub u128);

/// Accumulates an epoch's digest in stream order.
#[derive(Default)]
pub struct Digester {
    hash: Xxh3,
}

impl Digester {
    /// A digester that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds pages. How they are cut into batches does not matter.
    pub fn pages(&mut self, batch: &PageBatch) {
        let mut data = batch.data.chunks_exact(super::PAGE_SIZE);
        for entry in &batch.entries {
            self.hash.update(&entry.to_le_bytes());
            if PageBatch::has_data(*entry)
                && let Some(page) = data.next()
            {
                self.hash.update(page);
            }
        }
    }

    /// Adds a state record.
    pub fn record(&mut self, record: &Record) {
        let layer = match record.layer {
            Layer::Libxc => 1u32,
            Layer::Libxl => 2,
        };
        // Bits 63:52 of a page entry hold no gfn, so this tag cannot be mistaken for one.
        self.hash.update(&(0x0ff0_0000_0000_0000u64 | u64::from(layer)).to_le_bytes());
        self.hash.update(&record.kind.to_le_bytes());
        self.hash.update(&(record.body.len() as u64).to_le_bytes());
        self.hash.update(&record.body);
    }

    /// The digest of everything added so far; the digester starts anew.
    pub fn finish(&mut self) -> EpochDigest {
        let digest = EpochDigest(self.hash.digest128());
        self.hash.reset();
        digest
    }
}
