//! The hard deadline of the suspended section (DESIGN section 2, hazard F23).
//!
//! A thread of its own, with its own interface handles, that does only this: when armed and not disarmed in time, it resumes the
//! guest. So no lock, task, pipe or child of remusd can keep a guest standing.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::hypervisor::XenError;
use crate::ids::DomId;

/// How soon a late rescue looks again: a guest that had taken the request may suspend after the first rescue.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the guard does to the domain when the deadline passes.
pub trait Rescue {
    /// Withdraws a suspend request that is still pending, and resumes the domain (fast, then `XS_RESUME`) if it stands
    /// suspended; tells whether it stood. Must not wait for anything but the hypervisor and xenstored.
    ///
    /// # Errors
    /// A sentence for the log; the guard tries again.
    fn rescue(&mut self, domid: DomId) -> Result<bool, String>;
}

/// That and how the guard had to step in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fired {
    /// When the deadline had passed.
    pub at: Instant,
    /// When the guest was resumed; `None`: it never stood suspended, or the rescue failed.
    pub resumed: Option<Instant>,
    /// The last failure of a rescue.
    pub failure: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    fired: Option<Fired>,
    rescuing: bool,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of another holder leaves plain data in order; the guard must go on.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The guard of one domain. Dropping it ends its thread; if it is armed then, after a last rescue.
pub struct SuspendGuard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A clonable hand on a guard.
#[derive(Clone)]
pub struct GuardHandle {
    shared: Arc<Shared>,
}

impl SuspendGuard {
    /// Starts the thread. `open` runs on it (the interfaces are not `Send`) and its failure is returned here.
    ///
    /// # Errors
    /// [`XenError`] of `open`, or [`XenError::Open`] if no thread can be made. Blocks for the time `open` takes.
    pub fn start<R, F>(domid: DomId, open: F) -> Result<Self, XenError>
    where
        R: Rescue + 'static,
        F: FnOnce() -> Result<R, XenError> + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let (opened_tx, opened_rx) = std::sync::mpsc::channel();
        let inner = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("guard-{domid}"))
            .spawn(move || match open() {
                Ok(mut rescue) => {
                    let _ = opened_tx.send(Ok(()));
                    watch_over(&inner, domid, &mut rescue);
                }
                Err(error) => {
                    let _ = opened_tx.send(Err(error));
                }
            })
            .map_err(|error| XenError::Open { cause: format!("no thread for the suspend guard: {error}") })?;
        opened_rx.recv().map_err(|_| XenError::OwnerGone)??;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A hand on this guard for other tasks.
    #[must_use]
    pub fn handle(&self) -> GuardHandle {
        GuardHandle { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for SuspendGuard {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl GuardHandle {
    /// From now on the guest is resumed at `deadline` unless [`disarm`](Self::disarm) comes first. Arm before asking the guest to
    /// suspend. Replaces an earlier deadline. Never blocks.
    pub fn arm(&self, deadline: Instant) {
        let mut state = self.shared.lock();
        state.deadline = Some(deadline);
        state.fired = None;
        drop(state);
        self.shared.wake.notify_all();
    }

    /// Ends the armed time; returns what happened if the deadline had passed: then the guest was resumed behind the caller's back
    /// and the epoch must be abandoned. Waits for a rescue that is going on, so that afterwards nothing touches the domain.
    #[must_use = "a guard that fired means that the epoch is void"]
    pub fn disarm(&self) -> Option<Fired> {
        let mut state = self.shared.lock();
        state.deadline = None;
        self.shared.wake.notify_all();
        while state.rescuing {
            state = self.shared.wake.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.fired.take()
    }

    /// Whether the deadline has passed since the last [`arm`](Self::arm).
    #[must_use]
    pub fn has_fired(&self) -> bool {
        self.shared.lock().fired.is_some()
    }
}

fn watch_over(shared: &Shared, domid: DomId, rescue: &mut dyn Rescue) {
    let mut state = shared.lock();
    while !state.ending {
        let now = Instant::now();
        match state.deadline {
            Some(deadline) if deadline <= now => {
                state.fired.get_or_insert(Fired { at: now, resumed: None, failure: None });
                state.rescuing = true;
                drop(state);
                let outcome = rescue.rescue(domid);
                state = shared.lock();
                state.rescuing = false;
                if let Some(fired) = &mut state.fired {
                    match outcome {
                        Ok(true) => fired.resumed = Some(Instant::now()),
                        Ok(false) => {}
                        Err(failure) => fired.failure = Some(failure),
                    }
                }
                if let Some(deadline) = &mut state.deadline {
                    *deadline = Instant::now() + LOOK_AGAIN;
                }
                shared.wake.notify_all();
            }
            Some(deadline) => {
                state = shared
                    .wake
                    .wait_timeout(state, deadline - now)
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .0;
            }
            None => {
                state = shared.wake.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
    }
    // Armed to the last: whoever was to disarm has panicked, and the guest may stand suspended.
    if state.deadline.is_some() {
        drop(state);
        let _ = rescue.rescue(domid);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Recorder(Sender<Instant>, Vec<Result<bool, String>>);

    impl Rescue for Recorder {
        fn rescue(&mut self, domid: DomId) -> Result<bool, String> {
            assert_eq!(domid, DomId(7));
            let _ = self.0.send(Instant::now());
            self.1.pop().unwrap_or(Ok(false))
        }
    }

    fn guard(outcomes: Vec<Result<bool, String>>) -> (SuspendGuard, std::sync::mpsc::Receiver<Instant>) {
        let (tx, rx) = channel();
        let guard = SuspendGuard::start(DomId(7), move || Ok(Recorder(tx, outcomes))).unwrap();
        (guard, rx)
    }

    #[test]
    fn disarmed_in_time_does_nothing() {
        let (guard, rx) = guard(vec![]);
        let hand = guard.handle();
        hand.arm(Instant::now() + Duration::from_secs(3600));
        assert_eq!(hand.disarm(), None);
        drop(guard);
        assert!(rx.recv().is_err(), "no rescue happened");
    }

    #[test]
    fn fires_after_the_deadline_and_goes_on_until_disarmed() {
        // Popped from the back: a failure, then the late suspend is found.
        let (guard, rx) = guard(vec![Ok(true), Err("busy".into())]);
        let hand = guard.handle();
        let deadline = Instant::now() + Duration::from_millis(20);
        hand.arm(deadline);
        assert!(rx.recv().unwrap() >= deadline);
        rx.recv().unwrap();
        rx.recv().unwrap();
        assert!(hand.has_fired());
        let fired = hand.disarm().unwrap();
        assert!(fired.resumed.is_some());
        assert_eq!(fired.failure.as_deref(), Some("busy"));
        hand.arm(Instant::now() + Duration::from_secs(3600));
        assert!(!hand.has_fired());
        assert_eq!(hand.disarm(), None);
    }

    #[test]
    fn a_failed_open_is_reported() {
        let failed = SuspendGuard::start(DomId(7), || -> Result<Recorder, XenError> { Err(XenError::OwnerGone) });
        assert!(matches!(failed, Err(XenError::OwnerGone)));
    }
}
