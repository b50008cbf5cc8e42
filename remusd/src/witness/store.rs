//! What a witness has to be able to do.

use async_trait::async_trait;

use super::client::{CasReply, ReadError};
use super::record::{Position, Record, Versioned};
use crate::ids::ProtectionId;

/// A place that holds records, reached over a network that both hosts of a protection share with it. Every call ends within the
/// store's own timeout; dropping a call leaves its outcome unknown.
#[async_trait]
pub trait WitnessStore: Send + Sync {
    /// Reads a record, linearizably: what a swap has changed before this call began is seen.
    ///
    /// # Errors
    /// [`ReadError`].
    async fn read(&self, protection: ProtectionId) -> Result<Versioned, ReadError>;

    /// Replaces exactly `expected` (the record, or that there is none, at its `modified` revision) by `new`. Anything but certainty is
    /// [`CasReply::Unknown`].
    async fn cas(&self, protection: ProtectionId, expected: &Versioned, new: &Record) -> CasReply;

    /// Whether the witness could be asked now: a linearizable read of nothing in particular.
    ///
    /// # Errors
    /// A sentence.
    async fn probe(&self) -> Result<Position, String>;

    /// What it is and where, for people.
    fn describe(&self) -> String;
}
