//! Runs the operator's program for each event: `[events] hook` of remusd.toml. docs/operations.md has the contract.
//!
//! One task does it all: it takes events from the log as they come, so that the log never waits, keeps those that are wanted in a
//! bounded queue of its own and runs the program for one after the other. Nothing else in the daemon waits for it.

mod once;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::config::Events;
use crate::ops::{Delivery, Event, EventLog, Subscription};

/// Events that wait for the program at most; the oldest ones go.
const QUEUE: usize = 256;

/// The hook of one daemon.
pub struct Hook {
    settings: watch::Sender<Events>,
    ending: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
    abort: AbortHandle,
}

impl Hook {
    /// Follows the log from now on, with a task of its own. For use within the runtime.
    #[must_use]
    pub fn start(log: &EventLog, settings: Events) -> Self {
        let (_, events) = log.subscribe();
        let (settings, settings_read) = watch::channel(settings);
        let ending = CancellationToken::new();
        let follower = Follower {
            events,
            settings: settings_read,
            ending: ending.clone(),
            queue: VecDeque::new(),
            missed: 0,
            untold: 0,
        };
        let task = tokio::spawn(follower.follow());
        Self { settings, ending, abort: task.abort_handle(), task: Mutex::new(Some(task)) }
    }

    /// Other settings from now on, also for what waits. A run that is under way ends as it began.
    pub fn set(&self, settings: Events) {
        self.settings.send_replace(settings);
    }

    /// Ends it: what has happened until now is still told if that takes no longer than `patience`. A run that is under way then is killed.
    pub async fn finish(&self, patience: Duration) {
        self.ending.cancel();
        let Some(mut task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if tokio::time::timeout(patience, &mut task).await.is_err() {
            self.abort.abort();
            // Until its process group is killed.
            let _ = task.await;
            tracing::warn!("events.hook: not all of the last events were told to it");
        }
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        // With it goes a run that is under way: its process group is killed.
        self.abort.abort();
    }
}

/// Whether the program was run.
type Running = Pin<Box<dyn Future<Output = bool> + Send>>;

struct Follower {
    events: Subscription,
    settings: watch::Receiver<Events>,
    ending: CancellationToken,
    queue: VecDeque<Arc<Event>>,
    /// Events since the last run that the program was not told of.
    missed: u64,
    /// Of those, what the run under way says.
    untold: u64,
}

impl Follower {
    async fn follow(mut self) {
        let mut running: Option<Running> = None;
        loop {
            if running.is_none() {
                running = self.begin();
            }
            let idle = running.is_none();
            tokio::select! {
                // What was published before the end is taken before the end is seen.
                biased;
                delivery = self.events.next() => match delivery {
                    Some(delivery) => self.take(delivery),
                    None => return,
                },
                told = ended(&mut running), if !idle => {
                    running = None;
                    self.missed += if told { 0 } else { self.untold + 1 };
                }
                () = self.ending.cancelled(), if idle => return,
            }
        }
    }

    /// Queues what is wanted.
    fn take(&mut self, delivery: Delivery) {
        let settings = self.settings.borrow();
        if settings.hook.is_none() {
            return;
        }
        let lost = match delivery {
            Delivery::Missed(count) => count,
            Delivery::Event(event) => {
                if settings.hook_kinds.as_ref().is_some_and(|kinds| !kinds.contains(&event.kind)) {
                    return;
                }
                self.queue.push_back(event);
                let over = self.queue.len() > QUEUE;
                if over {
                    self.queue.pop_front();
                }
                u64::from(over)
            }
        };
        if self.missed == 0 && lost > 0 {
            tracing::warn!("events.hook: it is too slow, events are left out");
        }
        self.missed += lost;
    }

    /// Begins the next run, if there is something to tell and somebody to tell it to.
    fn begin(&mut self) -> Option<Running> {
        let settings = self.settings.borrow().clone();
        let Some(program) = settings.hook else {
            self.queue.clear();
            self.missed = 0;
            return None;
        };
        let event = self.queue.pop_front()?;
        self.untold = std::mem::take(&mut self.missed);
        if self.untold > 0 {
            tracing::warn!(missed = self.untold, "events.hook: it was not told of so many events before {}", event.seq);
        }
        let (limit, missed) = (Duration::from_millis(settings.hook_timeout_ms), self.untold);
        Some(Box::pin(once::run(program, event, missed, limit)))
    }
}

async fn ended(running: &mut Option<Running>) -> bool {
    match running {
        Some(running) => running.await,
        None => std::future::pending().await,
    }
}
