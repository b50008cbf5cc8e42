//! The daemon's event log: numbers events, keeps the latest, hands each to its subscribers' queues.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::subscription::{Queue, Subscription, Unsubscribe, run_callback};
use super::{DomainRef, Event, EventKind, Filter};
use crate::ops::operation::OperationNote;

/// Events kept for a subscriber that comes late, and that a slow one may lag behind.
pub(super) const KEPT: usize = 1024;

/// The daemon's event log: publish anywhere, subscribe at any time.
#[derive(Debug, Default)]
pub struct EventLog {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    seq: u64,
    kept: VecDeque<Arc<Event>>,
    subscribers: Vec<Arc<Queue>>,
}

impl EventLog {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records and sends an event. Never blocks on a subscriber.
    pub fn publish(&self, domain: DomainRef, kind: EventKind, detail: impl Into<String>) {
        self.publish_about(domain, kind, detail, None);
    }

    /// As [`Self::publish`], about an operation.
    pub fn publish_about(
        &self,
        domain: DomainRef,
        kind: EventKind,
        detail: impl Into<String>,
        operation: Option<OperationNote>,
    ) {
        let detail = detail.into();
        if kind.is_alarm() {
            tracing::error!(domain = domain.name, kind = kind.name(), "{detail}");
        } else {
            tracing::info!(domain = domain.name, kind = kind.name(), "{detail}");
        }
        let time_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let mut inner = self.inner();
        inner.seq += 1;
        let event = Arc::new(Event { seq: inner.seq, time_ms, domain, kind, detail, operation });
        inner.kept.push_back(event.clone());
        if inner.kept.len() > KEPT {
            inner.kept.pop_front();
        }
        // Put into the queues under the lock, so that every subscriber sees the same order; a queue runs nobody's code.
        inner.subscribers.retain(|queue| queue.put(&event));
    }

    /// The past events that are still kept, oldest first.
    #[must_use]
    pub fn kept(&self, filter: &Filter) -> Vec<Arc<Event>> {
        self.inner().kept.iter().filter(|event| filter.passes(event)).cloned().collect()
    }

    /// Everything: the past events that are still kept, and every later one, without a gap between them.
    #[must_use]
    pub fn subscribe(&self) -> (Vec<Arc<Event>>, Subscription) {
        self.subscribe_to(Filter::default())
    }

    /// As [`Self::subscribe`], filtered. Ends when the [`Subscription`] is dropped.
    #[must_use]
    pub fn subscribe_to(&self, filter: Filter) -> (Vec<Arc<Event>>, Subscription) {
        let mut inner = self.inner();
        let past = inner.kept.iter().filter(|event| filter.passes(event)).cloned().collect();
        let queue = Arc::new(Queue::new(filter));
        inner.subscribers.push(queue.clone());
        (past, Subscription::new(queue))
    }

    /// Calls `callback` for every later event that passes the filter, one at a time, in order, on a task of its own. It may call anything
    /// of this log, also the [`Unsubscribe`] that it is given: the delivery under way then is the last.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn call(
        &self,
        filter: Filter,
        callback: impl FnMut(super::Delivery, &Unsubscribe) + Send + 'static,
    ) -> Unsubscribe {
        let (_, subscription) = self.subscribe_to(filter);
        let unsubscribe = subscription.unsubscriber();
        tokio::spawn(run_callback(subscription, callback));
        unsubscribe
    }

    /// How many subscribers there are, without those that have gone.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.inner().subscribers.iter().filter(|queue| queue.is_open()).count()
    }
}
