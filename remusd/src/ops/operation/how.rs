//! The ways in which an initiator hears that its operation is complete.

use tokio::sync::oneshot;

use super::Outcome;
use crate::ops::{ErrorCode, Failure};

/// How the initiator wants to hear of the end.
pub enum How {
    /// Not at all: the `job_*` event is enough.
    Silent,
    /// Somebody waits.
    Wait(oneshot::Sender<Outcome>),
    /// Called once, on a task of its own.
    Callback(Box<dyn FnOnce(Outcome) + Send>),
    /// By an `operation_complete` event with this tag.
    Event {
        /// The initiator's own.
        tag: String,
    },
}

impl std::fmt::Debug for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Silent => "Silent",
            Self::Wait(_) => "Wait",
            Self::Callback(_) => "Callback",
            Self::Event { .. } => "Event",
        })
    }
}

impl How {
    /// To wait for it. A waiter that goes away loses nothing but the answer; the operation goes on.
    #[must_use]
    pub fn wait() -> (Self, Waiter) {
        let (send, receive) = oneshot::channel();
        (Self::Wait(send), Waiter(receive))
    }

    /// By event with this tag, or else by waiting.
    #[must_use]
    pub fn of(tag: Option<String>) -> (Self, Option<Waiter>) {
        match tag {
            Some(tag) => (Self::Event { tag }, None),
            None => {
                let (how, waiter) = Self::wait();
                (how, Some(waiter))
            }
        }
    }

    /// To be called.
    #[must_use]
    pub fn callback(call: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self::Callback(Box::new(call))
    }
}

/// Waits for one operation's end.
#[derive(Debug)]
pub struct Waiter(oneshot::Receiver<Outcome>);

impl Waiter {
    /// Waits. Never hangs: an operation without a completion (its initiation failed) ends as failed here.
    pub async fn outcome(self) -> Outcome {
        self.0.await.unwrap_or_else(|_| {
            Outcome::Failed(Failure::new(ErrorCode::Failed, "the operation was never begun; its initiation has failed"))
        })
    }
}
