//! The one task that takes watch events from the crate xenstore-rs.
//!
//! The crate's multiplexer waits for room in a queue of eight events per watch, and meanwhile answers no request of anybody: a
//! subscriber that is slow, or that itself asks xenstore, would lock the client up. So one task drains all watches at all times,
//! and subscribers see a counter: changes coalesce, and nobody has to keep up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use tokio::sync::{mpsc, watch};

use super::Watch;

type Events = BoxStream<'static, Box<str>>;
type Counters = Arc<Mutex<HashMap<String, watch::Sender<u64>>>>;

/// The hand on the task; it ends when the last hand is dropped.
pub(super) struct Pump {
    counters: Counters,
    new: mpsc::UnboundedSender<Events>,
}

fn locked(counters: &Counters) -> MutexGuard<'_, HashMap<String, watch::Sender<u64>>> {
    counters.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Pump {
    pub(super) fn start() -> Self {
        let (new, mut incoming) = mpsc::unbounded_channel::<Events>();
        tokio::spawn(async move {
            let mut watches: SelectAll<Events> = SelectAll::new();
            loop {
                tokio::select! {
                    added = incoming.recv() => match added {
                        Some(events) => watches.push(events),
                        None => return,
                    },
                    Some(_) = watches.next() => {}
                }
            }
        });
        Self { counters: Counters::default(), new }
    }

    /// Another subscription to a path that is watched already.
    pub(super) fn share(&self, path: &str) -> Option<Watch> {
        locked(&self.counters).get(path).map(|counter| Watch::new(counter.subscribe()))
    }

    /// Takes over a fresh watch. Its events are drained from now on; when nobody subscribes any more it ends with its next event.
    pub(super) fn add<S>(&self, path: &str, events: S) -> Watch
    where
        S: futures::Stream<Item = Box<str>> + Send + 'static,
    {
        let (counter, receiver) = watch::channel(0);
        locked(&self.counters).insert(path.to_owned(), counter.clone());
        let guard = Forget { counters: Arc::clone(&self.counters), path: path.to_owned(), counter };
        let counted = events.take_while(move |_| std::future::ready(guard.count()));
        // A pump that is gone has ended the runtime: the watch then says that xenstored is gone.
        let _ = self.new.send(counted.boxed());
        Watch::new(receiver)
    }
}

/// Lives in the stream of one watch: counts its events, and when the stream ends (nobody listens, or xenstored is gone) drops the
/// counter, which tells the subscribers that are left.
struct Forget {
    counters: Counters,
    path: String,
    counter: watch::Sender<u64>,
}

impl Forget {
    fn count(&self) -> bool {
        // Under the lock, so that nobody subscribes between the question and the end.
        let mut counters = locked(&self.counters);
        if self.counter.receiver_count() == 0 {
            self.remove(&mut counters);
            return false;
        }
        self.counter.send_modify(|count| *count += 1);
        true
    }

    fn remove(&self, counters: &mut HashMap<String, watch::Sender<u64>>) {
        if counters.get(&self.path).is_some_and(|counter| counter.same_channel(&self.counter)) {
            counters.remove(&self.path);
        }
    }
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.remove(&mut locked(&self.counters));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::super::StoreError;
    use super::*;

    fn source() -> (mpsc::Sender<Box<str>>, impl futures::Stream<Item = Box<str>>) {
        // Of eight, as in the crate: a ninth event that nobody takes would hang the test.
        let (sender, mut receiver) = mpsc::channel(8);
        (sender, futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)))
    }

    #[tokio::test]
    async fn drains_without_a_reader_and_coalesces() {
        let pump = Pump::start();
        let (events, stream) = source();
        let mut watch = pump.add("/a", stream);
        watch.changed().await.unwrap();
        for _ in 0..100 {
            timeout(Duration::from_secs(5), events.send("/a".into())).await.expect("the pump drains").unwrap();
        }
        let mut seen = 0;
        while timeout(Duration::from_millis(50), watch.changed()).await.is_ok() {
            seen += 1;
        }
        assert!((1..=100).contains(&seen));
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_told() {
        let pump = Pump::start();
        let (events, stream) = source();
        let mut watch = pump.add("/a", stream);
        watch.changed().await.unwrap();
        drop(events);
        assert!(matches!(watch.changed().await, Err(StoreError::Gone)));
        assert!(pump.share("/a").is_none());
    }

    #[tokio::test]
    async fn shares_a_path_and_ends_when_unused() {
        let pump = Pump::start();
        let (events, stream) = source();
        let first = pump.add("/a", stream);
        let mut second = pump.share("/a").unwrap();
        drop(first);
        second.changed().await.unwrap();
        events.send("/a".into()).await.unwrap();
        second.changed().await.unwrap();
        drop(second);
        let _ = events.send("/a".into()).await;
        events.closed().await;
        assert!(pump.share("/a").is_none());
    }
}
