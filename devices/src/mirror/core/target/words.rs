//! What a target is told and says: its actions, its replies, its errors.

use crate::mirror::core::extent::{Extent, GeometryError};
use crate::mirror::core::record::Record;
use crate::mirror::core::spill::Chunk;

/// What the caller has to do. One of `SaveHead`, `Apply` and `Flush` is under way at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetAction {
    /// Write the head with these values to stable storage, then call [`Target::saved`].
    SaveHead(HeadState),
    /// Do these in order to the disk, then call [`Target::applied`] with the answers to the checks.
    Apply(Vec<Record>),
    /// The same with records that are in the journal. None of them may be applied unless what is read back is what was
    /// written.
    ApplySpilled(Chunk),
    /// Flush the disk, then call [`Target::flushed`].
    Flush,
    /// Tell the source.
    Reply(Reply),
    /// The disk is exactly the activated epoch's, flushed, and the head says so: it may be served.
    Activated(u64),
    /// A whole epoch more is held.
    Held(u64),
    /// The copy cannot follow any more, and is not good.
    Broken(&'static str),
}

/// The part of the head that this machine decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadState {
    /// No synchronisation is unfinished.
    pub synced: bool,
    /// Batches may be half applied.
    pub applying: bool,
    /// The epoch that the copy is at, if it is at one.
    pub epoch: Option<u64>,
    /// It is the source from now on.
    pub source: bool,
}

/// What the source is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Batches up to this one are applied.
    Applied(u64),
    /// Batches up to this one are on stable storage.
    Durable(u64),
    /// The answer to a check.
    Checked {
        /// Which.
        id: u64,
        /// Whether the contents were the same.
        same: bool,
    },
}

/// The source broke the rules: the session ends, nothing of the open batch is applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// A record outside of the disk.
    #[error("the source sent a record that does not fit the disk: {0}")]
    Geometry(#[from] GeometryError),
    /// Data is not as long as its extent.
    #[error("the source sent {data} bytes for a range of {length}")]
    Length {
        /// Bytes.
        data: usize,
        /// Bytes.
        length: u32,
    },
    /// A batch out of order.
    #[error("the source closed batch {got}, batch {expected} was next")]
    Order {
        /// Expected number.
        expected: u64,
        /// Number in the record.
        got: u64,
    },
    /// What arrived is not what was sent.
    #[error("batch {0} does not have the contents that the source says it has; look for faulty memory")]
    Digest(u64),
    /// More than this side said it can hold.
    #[error("the source sent more than the {0} bytes that this side can hold")]
    Capacity(u64),
    /// The caller goes on although it has not written to the journal.
    #[error("a record came before the one before it was in the journal")]
    NotSpilled,
    /// Activation has begun.
    #[error("this copy takes in nothing any more: it is being activated")]
    Frozen,
}

/// Why an epoch cannot be activated or committed (R4, R5).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// It was never whole here.
    #[error("epoch {0} of the disk is not held here")]
    NotHeld(u64),
    /// Something newer is on the disk.
    #[error("the disk is ahead of epoch {0}")]
    Ahead(u64),
    /// Output was not held back yet.
    #[error("output was not held back in that epoch, or none has arrived: the copy is not fit for activation")]
    NotArmed,
    /// R4.
    #[error("the synchronisation of the disk is unfinished: the copy is not fit for activation")]
    NotSynced,
    /// An earlier failure.
    #[error("the copy is broken: {0}")]
    Broken(&'static str),
}

/// How far a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetProgress {
    /// Bytes held, in memory and in the journal.
    pub held: u64,
    /// Bytes of memory for them.
    pub in_memory: u64,
    /// Bytes of the journal that are in use.
    pub in_journal: u64,
    /// Batches that are whole here.
    pub received: u64,
    /// Batches on the disk.
    pub applied: u64,
    /// Batches on stable storage.
    pub durable: u64,
    /// The newest epoch that is whole here.
    pub newest_epoch: Option<u64>,
}

/// The answer to a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Which.
    pub id: u64,
    /// Whether the contents were the same.
    pub same: bool,
    /// As in the check.
    pub verify: bool,
}

/// The range that a record reads or writes.
#[must_use]
pub fn range_of(record: &Record) -> Option<Extent> {
    match record {
        Record::Write { extent, .. } | Record::Check { extent, .. } => Some(*extent),
        Record::SyncDone | Record::End(_) => None,
    }
}
