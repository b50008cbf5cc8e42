//! A subscriber's own queue, and the two ways to empty it: pulling, or a callback on a task of its own.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::log::KEPT;
use super::{Event, Filter};

/// What a subscriber gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The next event.
    Event(Arc<Event>),
    /// So many events did not fit into the queue; they lie before the next one.
    Missed(u64),
}

#[derive(Debug)]
pub(super) struct Queue {
    filter: Filter,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    events: VecDeque<Arc<Event>>,
    missed: u64,
    open: bool,
}

impl Queue {
    pub(super) fn new(filter: Filter) -> Self {
        let state = State { events: VecDeque::new(), missed: 0, open: true };
        Self { filter, state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_open(&self) -> bool {
        self.state().open
    }

    /// Appends an event that passes the filter; the oldest goes when there is no room. `false` once nobody listens any more.
    pub(super) fn put(&self, event: &Arc<Event>) -> bool {
        let mut state = self.state();
        if state.open && self.filter.passes(event) {
            if state.events.len() == KEPT {
                state.events.pop_front();
                state.missed += 1;
            }
            state.events.push_back(event.clone());
            self.changed.notify_one();
        }
        state.open
    }

    /// `None` when nothing waits.
    fn take(&self) -> Option<Delivery> {
        let mut state = self.state();
        match std::mem::take(&mut state.missed) {
            0 => state.events.pop_front().map(Delivery::Event),
            missed => Some(Delivery::Missed(missed)),
        }
    }

    fn close(&self) {
        let mut state = self.state();
        state.open = false;
        state.missed = 0;
        state.events.clear();
        drop(state);
        self.changed.notify_one();
    }
}

/// A subscription that its owner pulls from. Dropping it ends it.
#[derive(Debug)]
pub struct Subscription {
    queue: Arc<Queue>,
}

impl Subscription {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self { queue }
    }

    /// The next delivery, in the order of publication; `None` once the subscription was ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        loop {
            if let Some(delivery) = self.queue.take() {
                return Some(delivery);
            }
            if !self.queue.is_open() {
                return None;
            }
            self.queue.changed.notified().await;
        }
    }

    /// What waits already, without waiting.
    pub fn try_next(&mut self) -> Option<Delivery> {
        self.queue.take()
    }

    /// A way to end it from elsewhere.
    #[must_use]
    pub fn unsubscriber(&self) -> Unsubscribe {
        Unsubscribe { queue: self.queue.clone() }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// Ends a subscription, from anywhere, also from inside its own callback. Dropping it does nothing.
#[derive(Clone, Debug)]
pub struct Unsubscribe {
    queue: Arc<Queue>,
}

impl Unsubscribe {
    /// Nothing is delivered after this returns, but a delivery that is under way on another task runs to its end: what it uses must
    /// outlive it, which the callback's ownership sees to.
    pub fn now(&self) {
        self.queue.close();
    }
}

/// Runs a callback until it is unsubscribed. A panic in it ends this subscription and nothing else.
pub(super) async fn run_callback(
    mut subscription: Subscription,
    mut callback: impl FnMut(Delivery, &Unsubscribe) + Send,
) {
    let unsubscribe = subscription.unsubscriber();
    while let Some(delivery) = subscription.next().await {
        callback(delivery, &unsubscribe);
    }
}
