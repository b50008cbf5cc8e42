//! Between the drain thread and whoever sends the epoch: a queue with a budget in bytes.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{CaptureBudget, CaptureError};
use crate::ids::DomId;
use crate::stream::CaptureItem;

/// Counts since the helper was started; take differences for one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Page entries captured, with contents or without.
    pub pages: u64,
    /// Bytes read from the helper.
    pub bytes: u64,
    /// Epochs completed.
    pub epochs: u64,
    /// Bytes that are held now.
    pub held: usize,
    /// The most bytes that were ever held.
    pub held_max: usize,
    /// When the newest item was complete in memory.
    pub last_item: Option<Instant>,
    /// When the newest epoch was complete in memory.
    pub last_epoch: Option<Instant>,
    /// What the suspended guest waited for in the newest epoch, if the engine can tell.
    pub pause: Option<CapturePause>,
}

/// What the guest waited for while the engine copied it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapturePause {
    /// Finding the dirty pages, and mapping memory that has changed places.
    pub log: Duration,
    /// Copying them.
    pub copy: Duration,
    /// Reading vCPU and platform state.
    pub state: Duration,
}

struct State {
    queue: VecDeque<CaptureItem>,
    stats: CaptureStats,
    hard_mode: bool,
    discarding: bool,
    closing: bool,
    /// Set once: the stream has ended, well (`None`) or not.
    ended: Option<Option<CaptureError>>,
}

pub(super) struct Shared {
    state: Mutex<State>,
    room: Condvar,
    items: Notify,
    fault: Notify,
    budget: CaptureBudget,
    domid: DomId,
}

impl Shared {
    pub(super) fn new(domid: DomId, budget: CaptureBudget) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                stats: CaptureStats::default(),
                hard_mode: false,
                discarding: false,
                closing: false,
                ended: None,
            }),
            room: Condvar::new(),
            items: Notify::new(),
            fault: Notify::new(),
            budget,
            domid,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Queues an item; blocks while the soft budget is used up and the guest runs. Returns whether items are still wanted.
    pub(super) fn push(&self, item: CaptureItem) -> bool {
        let size = size(&item);
        let mut state = self.lock();
        while !state.discarding
            && !state.hard_mode
            && state.stats.held > 0
            && state.stats.held + size > self.budget.soft
        {
            state = self.room.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if state.discarding {
            return false;
        }
        if state.stats.held + size > self.budget.hard.max(self.budget.soft) {
            drop(state);
            self.end(Some(CaptureError::OverBudget { domid: self.domid, limit: self.budget.hard }));
            return false;
        }
        let now = Instant::now();
        match &item {
            CaptureItem::Pages(batch) => state.stats.pages += batch.entries.len() as u64,
            CaptureItem::EndOfEpoch => {
                state.stats.epochs += 1;
                state.stats.last_epoch = Some(now);
            }
            CaptureItem::Preamble(_) | CaptureItem::State(_) => {}
        }
        state.stats.last_item = Some(now);
        state.stats.held += size;
        state.stats.held_max = state.stats.held_max.max(state.stats.held);
        state.queue.push_back(item);
        drop(state);
        self.items.notify_one();
        true
    }

    pub(super) fn count(&self, bytes: usize) {
        self.lock().stats.bytes += bytes as u64;
    }

    /// The stream has ended; the first end stands. A stream that nobody wants any more may break off anywhere.
    pub(super) fn end(&self, error: Option<CaptureError>) {
        let mut state = self.lock();
        if state.ended.is_none() {
            let error = if state.discarding { None } else { error };
            if error.is_some() {
                state.discarding = true;
            }
            state.ended = Some(error);
        }
        drop(state);
        self.items.notify_one();
        self.fault.notify_one();
        self.room.notify_all();
    }

    /// From now on items are thrown away, so that the helper never waits for us.
    pub(super) fn discard(&self) {
        self.lock().discarding = true;
        self.room.notify_all();
    }

    /// As [`discard`](Self::discard), and the pipe is closed.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.discard();
    }

    pub(super) fn closing(&self) -> bool {
        self.lock().closing
    }

    pub(super) fn set_hard_mode(&self, on: bool) {
        self.lock().hard_mode = on;
        self.room.notify_all();
    }

    pub(super) fn stats(&self) -> CaptureStats {
        self.lock().stats
    }

    /// What the newest epoch's pause went to.
    pub(super) fn paused(&self, pause: CapturePause) {
        self.lock().stats.pause = Some(pause);
    }

    /// Waits until the stream has ended badly. Cancel-safe; for one waiter.
    pub(super) async fn failed(&self) -> CaptureError {
        loop {
            if let Some(Some(error)) = &self.lock().ended {
                return error.clone();
            }
            self.fault.notified().await;
        }
    }
}

fn size(item: &CaptureItem) -> usize {
    // What an item costs beyond its contents, roughly: also keeps a flood of empty records within the budget.
    const ITEM: usize = 128;
    ITEM + match item {
        CaptureItem::Preamble(bytes) => bytes.len(),
        CaptureItem::Pages(batch) => batch.size(),
        CaptureItem::State(record) => record.body.len(),
        CaptureItem::EndOfEpoch => 0,
    }
}

/// Receives the captured items in stream order. Dropping it makes the rest be thrown away.
pub struct ItemReceiver {
    shared: Arc<Shared>,
}

impl ItemReceiver {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The next item; its bytes go back to the budget now. `None` after the last one of a stream that ended with a whole epoch.
    /// Items that came before a fault are received before it. Cancel-safe.
    ///
    /// # Errors
    /// [`CaptureError`] when the stream broke; again on each further call.
    pub async fn recv(&mut self) -> Result<Option<CaptureItem>, CaptureError> {
        loop {
            if let Some(outcome) = self.try_recv() {
                return outcome;
            }
            self.shared.items.notified().await;
        }
    }

    /// The next item or the end if it is there already; never waits.
    pub fn try_recv(&mut self) -> Option<Result<Option<CaptureItem>, CaptureError>> {
        let mut state = self.shared.lock();
        if let Some(item) = state.queue.pop_front() {
            state.stats.held = state.stats.held.saturating_sub(size(&item));
            drop(state);
            self.shared.room.notify_all();
            return Some(Ok(Some(item)));
        }
        state.ended.as_ref().map(|ended| match ended {
            Some(error) => Err(error.clone()),
            None => Ok(None),
        })
    }

    /// Counts since the start.
    #[must_use]
    pub fn stats(&self) -> CaptureStats {
        self.shared.stats()
    }
}

impl Drop for ItemReceiver {
    fn drop(&mut self) {
        self.shared.discard();
    }
}

/// What a test has captured, and its receiver.
#[cfg(test)]
pub(crate) fn played() -> (impl Fn(CaptureItem), ItemReceiver) {
    let shared = Shared::new(DomId(1), CaptureBudget::default());
    let receiver = ItemReceiver::new(shared.clone());
    (
        move |item| {
            shared.push(item);
        },
        receiver,
    )
}
