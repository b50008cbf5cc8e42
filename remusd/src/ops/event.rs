//! Events (seed 002): values only, never handles; a slow subscriber is told how much it missed and slows nobody.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::ids::{DomId, ProtectionId};

/// Events kept for a subscriber that comes late.
const HISTORY: usize = 1024;

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

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// Primary: protection is being set up; the guest is unprotected.
    Protecting,
    /// Primary: first copy or another unarmed epoch done; detail has pages and bytes.
    FirstCopyProgress,
    /// Primary: the first armed epoch is acknowledged. From here on the guest survives the loss of this host.
    Protected,
    /// An ALARM: this guest has no backup now. Detail says why and what to do.
    Unprotected,
    /// Primary: the backup is lost and output is held by policy until an operator decides.
    Holding,
    /// Who decides when one side is lost: the witness or the primary. ALARM when a configured witness does not.
    WhoDecides,
    /// ALARM: the witness answers something that it must not: absent, rolled back, another store; detail says which.
    WitnessTrouble,
    /// Primary: the other host has won the guest; this copy is frozen until that one runs or is given up.
    Yielding,
    /// Primary: the guest could not be moved; detail says what is so now.
    SwitchoverFailed,
    /// ALARM: two copies may be live.
    Conflict,
    /// Primary: protection ended as asked; no copy is left on the backup.
    Stopped,
    /// This host's copy lost: it is sealed and stopped, the other host runs the guest.
    Superseded,
    /// The guest powered off, rebooted or crashed under protection; detail says which and what was done.
    GuestEnded,
    /// An epoch was abandoned; detail says why.
    EpochAbandoned,
    /// Held output was lost to the buffer's limit or a reset of the qdisc.
    BufferDrops,
    /// Backup: a copy is being received.
    Receiving,
    /// Backup: the first armed epoch is held; the copy can be activated.
    Ready,
    /// Backup: nothing is heard from the primary.
    PrimarySuspect,
    /// Backup: the copy is being activated.
    Activating,
    /// Backup: the copy runs here now.
    Activated,
    /// Backup: the copy could not be activated; detail says why.
    ActivationFailed,
    /// Backup: the copy was destroyed; detail says why.
    Discarded,
    /// After a crash of the daemon: what was found and put right.
    Recovered,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of this daemon from 1; gaps tell a subscriber what it missed.
    pub seq: u64,
    /// Milliseconds since the Unix epoch, this host's clock.
    pub time_ms: u64,
    /// Which domain.
    pub domain: DomainRef,
    /// What happened.
    pub kind: EventKind,
    /// A sentence for people.
    pub detail: String,
}

/// The daemon's event log: publish anywhere, subscribe at any time.
#[derive(Debug)]
pub struct EventLog {
    inner: Mutex<Inner>,
    live: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct Inner {
    seq: u64,
    history: VecDeque<Event>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self { inner: Mutex::default(), live: broadcast::channel(HISTORY).0 }
    }
}

impl EventLog {
    /// Records and sends an event. Never blocks on a subscriber.
    pub fn publish(&self, domain: DomainRef, kind: EventKind, detail: impl Into<String>) {
        let detail = detail.into();
        match kind {
            EventKind::Unprotected
            | EventKind::Holding
            | EventKind::Yielding
            | EventKind::Conflict
            | EventKind::WitnessTrouble
            | EventKind::SwitchoverFailed
            | EventKind::ActivationFailed => {
                tracing::error!(domain = domain.name, ?kind, "{detail}");
            }
            _ => tracing::info!(domain = domain.name, ?kind, "{detail}"),
        }
        let mut inner = self.inner.lock().expect("no panic while locked");
        inner.seq += 1;
        let time_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let event = Event { seq: inner.seq, time_ms, domain, kind, detail };
        inner.history.push_back(event.clone());
        if inner.history.len() > HISTORY {
            inner.history.pop_front();
        }
        // Sent under the lock to keep the order; the channel never runs subscribers' code.
        let _ = self.live.send(event);
    }

    /// The past events that are still kept, and a receiver of every later one, without a gap between them.
    pub fn subscribe(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let inner = self.inner.lock().expect("no panic while locked");
        (inner.history.iter().cloned().collect(), self.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> DomainRef {
        DomainRef { domid: Some(DomId(3)), name: "g".into(), uuid: ProtectionId::nil() }
    }

    #[test]
    fn history_and_live_join_without_gap() {
        let log = EventLog::default();
        log.publish(domain(), EventKind::Protecting, "a");
        let (past, mut live) = log.subscribe();
        log.publish(domain(), EventKind::Protected, "b");
        assert_eq!(past.iter().map(|e| e.seq).collect::<Vec<_>>(), [1]);
        assert_eq!(live.try_recv().unwrap().seq, 2);
    }

    #[test]
    fn a_slow_subscriber_learns_what_it_missed() {
        let log = EventLog::default();
        let (_, mut live) = log.subscribe();
        for _ in 0..HISTORY + 5 {
            log.publish(domain(), EventKind::Protected, "x");
        }
        assert!(matches!(live.try_recv(), Err(broadcast::error::TryRecvError::Lagged(_))));
    }
}
