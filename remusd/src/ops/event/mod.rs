//! Events: what happened to which domain, as values and never as handles (seed 002).
//!
//! Whoever wants to know subscribes to the [`EventLog`], by pulling from a [`Subscription`] or with a callback. Publishing takes one
//! short lock and copies a pointer into each subscriber's own queue; nobody's code runs under it. So a subscriber may subscribe,
//! unsubscribe and publish from inside a delivery, and a slow one delays nobody: its queue is bounded, what does not fit is counted,
//! and it is told the count.

mod log;
mod subscription;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::operation::OperationNote;
use crate::ids::{DomId, ProtectionId};

pub use log::EventLog;
pub use subscription::{Delivery, Subscription, Unsubscribe};

/// The domain an event is about, as it was when the event happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRef {
    /// Domain id on this host at that time.
    pub domid: Option<DomId>,
    /// Domain name without `--incoming`.
    pub name: String,
    /// The domain's UUID, which names the protection.
    pub uuid: ProtectionId,
}

impl DomainRef {
    /// Whether an operator who types this means the domain: its name, UUID or id.
    #[must_use]
    pub fn is_meant_by(&self, typed: &str) -> bool {
        typed == self.name || typed.parse() == Ok(self.uuid) || self.domid.is_some_and(|id| typed.parse() == Ok(id.0))
    }
}

/// Declares the kinds together with their names on the wire, so that neither can be forgotten.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[$doc])* #[serde(rename = $name)] $kind,)*
        }

        impl EventKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// Its name in the control API and on the command line.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }
    };
}

kinds! {
    /// Primary: protection is being set up; the guest is unprotected.
    Protecting = "protecting",
    /// Primary: first copy or another unarmed epoch done; detail has pages and bytes.
    FirstCopyProgress = "first_copy_progress",
    /// Primary: the first armed epoch is acknowledged. From here on the guest survives the loss of this host.
    Protected = "protected",
    /// Primary: output was held for one epoch far longer than the interval; told when it begins, not for every epoch.
    EpochSlow = "epoch_slow",
    /// An epoch was abandoned; detail says why.
    EpochAbandoned = "epoch_abandoned",
    /// Primary: held output nears the buffer's limit; beyond it packets are lost.
    BufferHighWater = "buffer_high_water",
    /// Primary: held output was lost to the buffer's limit or a reset of the qdisc.
    BufferDrops = "buffer_drops",
    /// Protected, but with something weakened that the next fault may need; detail says what.
    Degraded = "degraded",
    /// An ALARM: this guest has no backup now. Detail says why and what to do.
    Unprotected = "unprotected",
    /// Primary: the backup is lost and output is held by policy until an operator decides.
    Holding = "holding",
    /// Who decides when one side is lost: the witness or the primary. ALARM when a configured witness does not.
    WhoDecides = "who_decides",
    /// ALARM: the witness answers something that it must not: absent, rolled back, another store; detail says which.
    WitnessTrouble = "witness_trouble",
    /// Primary: the other host has won the guest; this copy is frozen until that one runs or is given up.
    Yielding = "yielding",
    /// Primary: the guest could not be moved; detail says what is so now.
    SwitchoverFailed = "switchover_failed",
    /// ALARM: two copies may be live.
    Conflict = "conflict",
    /// Primary: protection ended as asked; no copy is left on the backup.
    Stopped = "stopped",
    /// This host has won the right to run the guest.
    ArbitrationWon = "arbitration_won",
    /// The other host has it.
    ArbitrationLost = "arbitration_lost",
    /// This host's copy lost: it is sealed and stopped, the other host runs the guest.
    Superseded = "superseded",
    /// The guest powered off, rebooted or crashed under protection; detail says which and what was done.
    GuestEnded = "guest_ended",
    /// Backup: a copy is being received.
    Receiving = "receiving",
    /// Backup: the first armed epoch is held; the copy can be activated.
    Ready = "ready",
    /// Backup: nothing is heard from the primary.
    PrimarySuspect = "primary_suspect",
    /// Backup: the copy is being activated.
    Activating = "activating",
    /// Backup: the copy runs here now.
    Activated = "activated",
    /// Backup: the copy could not be activated; detail says why.
    ActivationFailed = "activation_failed",
    /// Backup: a drill has shown that the last epoch would start.
    Drilled = "drilled",
    /// ALARM, backup: a drill has shown that it would not; detail says what went wrong.
    DrillFailed = "drill_failed",
    /// Backup: the copy was destroyed; detail says why.
    Discarded = "discarded",
    /// After a crash of the daemon: what was found and put right.
    Recovered = "recovered",
    /// ALARM: pages of the copy differ from the guest's although none was written to; the copy is made anew.
    AuditDiffers = "audit_differs",
    /// One side is neither well nor gone; the text says which failure began or ended and what follows.
    GrayFailure = "gray_failure",
    /// The copies of a disk, or of memory after an audit, are being made equal again.
    ResyncStarted = "resync_started",
    /// How far that is.
    ResyncProgress = "resync_progress",
    /// That has ended; detail says how.
    ResyncEnded = "resync_ended",
    /// An operation (job) has done what it was to do. Every operation ends in exactly one of the three `job_*` events.
    JobCompleted = "job_completed",
    /// An operation was aborted.
    JobCancelled = "job_cancelled",
    /// An operation has failed; detail says why.
    JobFailed = "job_failed",
    /// The answer to an initiator that chose to be told by an event: carries its tag and the outcome.
    OperationComplete = "operation_complete",
}

impl EventKind {
    /// Whether an operator should be woken.
    #[must_use]
    pub fn is_alarm(self) -> bool {
        matches!(
            self,
            Self::Unprotected
                | Self::Holding
                | Self::Yielding
                | Self::Conflict
                | Self::WitnessTrouble
                | Self::AuditDiffers
                | Self::SwitchoverFailed
                | Self::DrillFailed
                | Self::ActivationFailed
        )
    }
}

impl std::str::FromStr for EventKind {
    type Err = String;

    /// Takes `-` for `_`, as people type.
    fn from_str(typed: &str) -> Result<Self, String> {
        let name = typed.replace('-', "_");
        Self::ALL.iter().copied().find(|kind| kind.name() == name).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("no event is called {typed}; there are {}", all.join(", "))
        })
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of this run of the daemon from 1; gaps tell a subscriber what it missed.
    pub seq: u64,
    /// Milliseconds since the Unix epoch, this host's clock.
    pub time_ms: u64,
    /// Which domain.
    pub domain: DomainRef,
    /// What happened.
    pub kind: EventKind,
    /// A sentence for people.
    pub detail: String,
    /// The operation that a `job_*` or `operation_complete` event is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationNote>,
}

/// Which events a subscriber wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only those of this domain: name, UUID or id.
    pub domain: Option<String>,
    /// Only these kinds; all when empty.
    pub kinds: Vec<EventKind>,
    /// Only those with a greater `seq`.
    pub after: u64,
}

impl Filter {
    /// Whether it lets an event pass.
    #[must_use]
    pub fn passes(&self, event: &Event) -> bool {
        event.seq > self.after
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && self.domain.as_deref().is_none_or(|typed| event.domain.is_meant_by(typed))
    }
}
