//! What the service tells whoever listens.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::{Deserialize, Serialize};

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[allow(missing_docs)] // The fields say what they are.
pub enum DiskEvent {
    /// Source: a session with the copy has begun; `regions` are to be synchronised.
    Connected { peer: String, regions: u32 },
    /// Source: there is no session any more: the disk has one copy. An alarm while the guest is protected.
    Disconnected { why: String },
    /// Source: a session could not begin.
    Unreachable { why: String },
    /// Source: the copies are alike.
    InSync {},
    /// Source: a difference was found, which synchronisation repairs. An alarm.
    OutOfSync {},
    /// Source: the open epoch is large: take a checkpoint soon.
    CutWanted {},
    /// Source: a verify job has ended.
    Verified { bytes: u64, differing: u64, complete: bool },
    /// Target: all of the epoch is here.
    Held { epoch: u64 },
    /// Target: the copy is broken. An alarm.
    Broken { why: String },
    /// Target: a source follows no more, or another one does.
    SourceGone { why: String },
    /// The listener was too slow and has missed so many.
    Missed { count: u64 },
}

#[derive(Default)]
pub(super) struct Events(Mutex<Vec<(SyncSender<DiskEvent>, u64)>>);

impl Events {
    /// Does not block: a slow listener misses events, and is told how many.
    pub(super) fn tell(&self, event: &DiskEvent) {
        tracing::info!(?event, "disk");
        let mut listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain_mut(|(to, missed)| {
            if *missed > 0 && to.try_send(DiskEvent::Missed { count: *missed }).is_ok() {
                *missed = 0;
            }
            match to.try_send(event.clone()) {
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(_)) => *missed += 1,
                Ok(()) => {}
            }
            true
        });
    }

    pub(super) fn listen(&self) -> Receiver<DiskEvent> {
        let (to, from) = sync_channel(256);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((to, 0));
        from
    }
}
