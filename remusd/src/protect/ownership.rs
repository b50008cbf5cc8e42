//! The witness as a protection uses it, on either side: how it is opened, and what its answers mean to the primary's machine.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::machine::Event;
use crate::ids::ProtectionId;
use crate::witness::{Health, Intent, Keeper, KeeperEvent, Outcome, Probe};

/// How long an answer may take before the machine hears that it is unknown. The keeper goes on asking.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// As [`PATIENCE`], while the guest stands still for it.
pub const STANDING: Duration = Duration::from_secs(2);

/// For what has no alternative: asked until it is settled.
pub const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The witness of one protection, opened.
pub struct Opened {
    /// Asks it.
    pub keeper: Keeper,
    /// What nobody waited for.
    pub events: mpsc::UnboundedReceiver<KeeperEvent>,
    /// Whether it answers.
    pub health: watch::Receiver<Health>,
    /// Keeps the probe running.
    pub probe: Option<Arc<Probe>>,
}

/// Opens witnesses by the text that names them.
pub trait WitnessSource: Send + Sync {
    /// Opens the witness that `spec` names, for this protection. Must be called on the runtime; asks nobody yet.
    ///
    /// # Errors
    /// A sentence with what to do.
    fn open(&self, spec: &str, protection: ProtectionId) -> Result<Opened, String>;

    /// Whether this host has ever seen a record of this protection.
    ///
    /// # Errors
    /// A sentence: what cannot be read must not count as never seen (R4).
    fn has_seen(&self, protection: ProtectionId) -> Result<bool, String>;
}

/// A host without any witness.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWitness;

impl WitnessSource for NoWitness {
    fn open(&self, spec: &str, _: ProtectionId) -> Result<Opened, String> {
        Err(format!("this host cannot use the witness {spec}"))
    }

    fn has_seen(&self, _: ProtectionId) -> Result<bool, String> {
        Ok(false)
    }
}

/// What a claim, or a forced one, came to.
#[must_use]
pub fn claimed(outcome: Outcome) -> Event {
    match outcome {
        Outcome::Won(record) => Event::ClaimWon(record.key()),
        Outcome::Lost(record) => Event::ClaimLost(record.to_string()),
        Outcome::Refused(why) => Event::ClaimRefused(why.to_string()),
        Outcome::Seen(_) => Event::ClaimUnknown,
    }
}

/// What recording a stop came to. A record that is ours but allows no stop (handed over, claimed) tells nothing about the backup.
#[must_use]
pub fn stopped(outcome: Outcome) -> Event {
    match outcome {
        Outcome::Won(_) => Event::RecordStopped,
        Outcome::Lost(record) => Event::RecordLost(record.to_string()),
        Outcome::Refused(why) => Event::RecordUnknown(why.to_string()),
        Outcome::Seen(record) => Event::RecordUnknown(record.to_string()),
    }
}

/// What recording a hand-over came to.
#[must_use]
pub fn handed(outcome: Outcome) -> Event {
    match stopped(outcome) {
        Event::RecordStopped => Event::RecordHanded,
        other => other,
    }
}

/// What an answer that came late means; `None`: nothing any more.
#[must_use]
pub fn late(intent: &Intent, outcome: Outcome) -> Option<Event> {
    match intent {
        Intent::Claim(_) | Intent::Force { .. } => Some(claimed(outcome)),
        Intent::Stop(_) => Some(stopped(outcome)),
        _ => None,
    }
}
