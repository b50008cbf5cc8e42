//! What the primary tells the backup about a disk, in one order.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::extent::Extent;

/// What becomes of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// These bytes.
    Data(Bytes),
    /// Zeroes, whether the guest asked for that or discarded the range: both sides read zeroes afterwards.
    Zeroes,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The range has these contents from now on.
    Write {
        /// Where.
        extent: Extent,
        /// What; data is as long as the extent.
        payload: Payload,
    },
    /// At this place in the order the range should have contents with this digest; the backup answers whether it has.
    Check {
        /// Names it in the answer.
        id: u64,
        /// Where.
        extent: Extent,
        /// See [`digest`].
        digest: u128,
        /// The copies should be alike: a difference makes the copy unfit for activation until the next `SyncDone`.
        verify: bool,
    },
    /// Everything that differed has been sent: once this is applied, the copies are alike.
    SyncDone,
    /// A batch is complete.
    End(BatchEnd),
}

/// Closes a batch: what is applied as a whole or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchEnd {
    /// Number of the batch in its session, from 1.
    pub batch: u64,
    /// The epoch that ends with it. Without one the batch was only closed for its size or age.
    pub epoch: Option<u64>,
    /// Whether it must not be applied before its epoch is committed.
    pub armed: bool,
    /// Records in the batch, without this one.
    pub records: u64,
    /// Bytes of data in them.
    pub bytes: u64,
    /// Over the records, see [`BatchDigest`].
    pub digest: u128,
}

/// What a record costs besides its data, in bytes of memory and of the stream.
const OVERHEAD: u64 = 128;

impl Record {
    /// What it counts for in the accounts of both sides, in bytes.
    #[must_use]
    pub fn cost(&self) -> u64 {
        match self {
            Record::Write { payload: Payload::Data(data), .. } => OVERHEAD + data.len() as u64,
            _ => OVERHEAD,
        }
    }

    /// Bytes of data in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.cost() - OVERHEAD
    }
}

/// Digest of contents: XXH3, 128 bits.
#[must_use]
pub fn digest(contents: &[u8]) -> u128 {
    xxhash_rust::xxh3::xxh3_128(contents)
}

/// Over what a batch says, taken by both sides on their own (R7).
#[derive(Default)]
pub struct BatchDigest {
    hasher: Xxh3,
    records: u64,
    bytes: u64,
}

impl BatchDigest {
    /// Takes in one record: a tag, and what it says, little-endian.
    pub fn update(&mut self, record: &Record) {
        let mut fields = |tag: u8, extent: Option<Extent>, rest: &[u8]| {
            self.hasher.update(&[tag]);
            if let Some(extent) = extent {
                self.hasher.update(&extent.offset.to_le_bytes());
                self.hasher.update(&extent.length.to_le_bytes());
            }
            self.hasher.update(rest);
        };
        match record {
            Record::Write { extent, payload: Payload::Data(data) } => fields(1, Some(*extent), data),
            Record::Write { extent, payload: Payload::Zeroes } => fields(2, Some(*extent), &[]),
            Record::Check { id, extent, digest, verify } => {
                fields(if *verify { 5 } else { 3 }, Some(*extent), &digest.to_le_bytes());
                self.hasher.update(&id.to_le_bytes());
            }
            Record::SyncDone => fields(4, None, &[]),
            Record::End(_) => return,
        }
        self.records += 1;
        self.bytes += record.bytes();
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Closes the batch and starts the next.
    pub fn end(&mut self, batch: u64, epoch: Option<u64>, armed: bool) -> BatchEnd {
        let done = std::mem::take(self);
        BatchEnd { batch, epoch, armed, records: done.records, bytes: done.bytes, digest: done.hasher.digest128() }
    }
}
