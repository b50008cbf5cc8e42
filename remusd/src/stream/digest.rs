//! The digest of an epoch over its decoded contents (DESIGN R7, hazard F18).
//!
//! Taken by the primary over what it captured, by the backup over what it will apply, so that a fault of codec, cache,
//! transport or staging is seen before the epoch is acknowledged.

use xxhash_rust::xxh3::Xxh3;

use super::item::{Layer, PageBatch, Record};

/// Digest of one epoch: XXH3, 128 bits. Detects faults, not attackers: the transport authenticates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochDigest(pub u128);

/// Accumulates an epoch's digest. Page entries, page contents and state records are hashed as three streams, each in stream order, so
/// that how pages are cut into batches does not matter and each stream is hashed in bulk.
#[derive(Default)]
pub struct Digester {
    entries: Xxh3,
    data: Xxh3,
    records: Xxh3,
}

impl Digester {
    /// A digester that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds pages.
    pub fn pages(&mut self, batch: &PageBatch) {
        let mut bytes = [0; 8 * 512];
        for entries in batch.entries.chunks(512) {
            for (slot, entry) in bytes.chunks_exact_mut(8).zip(entries) {
                slot.copy_from_slice(&entry.to_le_bytes());
            }
            self.entries.update(&bytes[..entries.len() * 8]);
        }
        self.data.update(&batch.data);
    }

    /// Adds a state record.
    pub fn record(&mut self, record: &Record) {
        let layer = match record.layer {
            Layer::Libxc => 1u32,
            Layer::Libxl => 2,
        };
        self.records.update(&layer.to_le_bytes());
        self.records.update(&record.kind.to_le_bytes());
        self.records.update(&(record.body.len() as u64).to_le_bytes());
        self.records.update(&record.body);
    }

    /// The digest of everything added so far; the digester starts anew.
    pub fn finish(&mut self) -> EpochDigest {
        let Self { entries, data, records } = std::mem::take(self);
        let mut all = Xxh3::new();
        for part in [entries, data, records] {
            all.update(&part.digest128().to_le_bytes());
        }
        EpochDigest(all.digest128())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::stream::PAGE_SIZE;

    const HOLE: u64 = 0xf << 60;

    fn batch(entries: &[u64], fill: &[u8]) -> PageBatch {
        let data: Vec<u8> = fill.iter().flat_map(|b| [*b; PAGE_SIZE]).collect();
        PageBatch { entries: entries.to_vec(), data: Bytes::from(data) }
    }

    fn digest(batches: &[PageBatch]) -> EpochDigest {
        let mut digester = Digester::new();
        batches.iter().for_each(|b| digester.pages(b));
        digester.finish()
    }

    #[test]
    fn cutting_does_not_matter_contents_and_order_do() {
        let whole = digest(&[batch(&[1, HOLE | 2, 3], &[7, 8])]);
        assert_eq!(whole, digest(&[batch(&[1], &[7]), batch(&[HOLE | 2], &[]), batch(&[3], &[8])]));
        for other in [
            batch(&[1, HOLE | 2, 3], &[7, 9]),
            batch(&[1, HOLE | 2, 4], &[7, 8]),
            batch(&[1, HOLE | 2, 3], &[8, 7]),
            batch(&[1, 3], &[7, 8]),
        ] {
            assert_ne!(whole, digest(&[other]));
        }
    }

    #[test]
    fn finishing_starts_anew() {
        let mut digester = Digester::new();
        let empty = digester.finish();
        digester.record(&Record { layer: Layer::Libxc, kind: 9, body: Bytes::from_static(b"x") });
        assert_ne!(digester.finish(), empty);
        assert_eq!(digester.finish(), empty);
    }
}
