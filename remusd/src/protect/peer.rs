//! Where epochs go, as the driver sees it. The link is one such place; a stock receiver and a black hole are the others.

use async_trait::async_trait;

use super::machine::StopWhy;
use crate::audit::Sample;
use crate::ids::Epoch;
pub use crate::link::EpochEnd;
use crate::link::{Heartbeat, Token};
use crate::stream::{PageBatch, Record};

/// Sending failed: the peer counts as lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PeerLost(pub String);

/// The data path: one epoch after the other. Calls wait for room, which holds up nothing but the next epoch.
#[async_trait]
pub trait Outlet: Send {
    /// The static part, once, first.
    async fn preamble(&mut self, bytes: bytes::Bytes) -> Result<(), PeerLost>;
    /// An epoch begins.
    async fn begin(&mut self, epoch: Epoch, armed: bool) -> Result<(), PeerLost>;
    /// Pages. Returns the bytes sent for them.
    async fn pages(&mut self, epoch: Epoch, batch: PageBatch) -> Result<u64, PeerLost>;
    /// Platform or device-model state. Returns the bytes sent for it.
    async fn record(&mut self, epoch: Epoch, record: Record) -> Result<u64, PeerLost>;
    /// The epoch is complete.
    async fn end(&mut self, end: EpochEnd) -> Result<(), PeerLost>;
    /// What the audit read of the guest in this epoch; after its end. Peers without a `remusd` cannot compare and ignore it.
    async fn audit(&mut self, _sample: Sample) -> Result<(), PeerLost> {
        Ok(())
    }
}

/// What the guest is doing, for the backup's detector (hazard F22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestDoes {
    /// It runs.
    Runs,
    /// It stands still for a checkpoint.
    Suspended,
    /// It does not react to suspend requests.
    Stuck,
    /// It has ended by itself.
    Ended,
}

/// The control path: never behind pages.
#[async_trait]
pub trait PeerControl: Send + Sync {
    /// Asks the peer to destroy its copy; a [`PeerEvent::Stopped`] follows if it does.
    async fn stop(&self, why: &StopWhy);
    /// Proposes a mode; a [`PeerEvent::TokenAck`] follows once the peer has it on disk. Peers without a `remusd` ignore it.
    async fn token(&self, _seq: u64, _token: Token) {}
    /// Hands the guest over; [`PeerEvent::Superseded`] or [`PeerEvent::HandoverFailed`] follows.
    async fn hand_over(&self, _epoch: Epoch, _token: Token) {}
    /// Told to the peer with the next heartbeat.
    fn guest_does(&self, epoch: Epoch, does: GuestDoes);
    /// Ends the connection without a word.
    async fn close(&self);
}

/// What comes from the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// It holds the whole epoch.
    Ack(Epoch),
    /// A sign of life, and what it is a sign of.
    Beat(Heartbeat),
    /// This host was starved or frozen for so long.
    Starved(std::time::Duration),
    /// It answers, but does not acknowledge an epoch that it has whole (hazard F22).
    AckLate,
    /// It has destroyed its copy.
    Stopped,
    /// It is lost, or says that it cannot hold a copy any more.
    Lost(String),
    /// Its copy has been activated.
    Superseded(String),
    /// It has this mode on disk.
    TokenAck(u64),
    /// It could not take the guest over; nothing is left of its copy.
    HandoverFailed(String),
}
