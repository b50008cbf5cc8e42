//! One operation: the machine behind its lock, and the handles of those who drive it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::machine::{Effect, Input, Machine, Phase};
use super::registry::Shared;
use super::{How, Job, JobState, OperationId, OperationNote, Outcome, Progress, Spec};
use crate::ops::{ErrorCode, EventKind, Failure};

/// What the lock holds.
#[derive(Debug)]
struct Core {
    machine: Machine,
    /// Until it is delivered or dropped.
    how: Option<How>,
    outcome: Option<Outcome>,
    /// Why it cannot be aborted (any more).
    committed: Option<&'static str>,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) id: OperationId,
    spec: Spec,
    started: Instant,
    started_ms: u64,
    core: Mutex<Core>,
    pub(super) cancel: CancellationToken,
    /// The outcome, for those who wait for an operation that is not theirs.
    pub(super) ended: watch::Sender<Option<Outcome>>,
    pub(super) progress: watch::Sender<Option<Progress>>,
    pub(super) shared: Weak<Shared>,
}

/// What is to be done once the lock is released.
#[derive(Debug, Default)]
pub(super) struct Todo {
    pub(super) answers: &'static [Effect],
    deliver: Option<(How, Outcome)>,
    dropped: Option<How>,
}

impl Cell {
    pub(super) fn new(id: OperationId, spec: Spec, how: How, started_ms: u64, shared: Weak<Shared>) -> Self {
        let mut machine = Machine::default();
        if spec.never_abort.is_some() {
            machine.step(Input::PointOfNoReturn);
        }
        let committed = spec.never_abort;
        Self {
            id,
            spec,
            started: Instant::now(),
            started_ms,
            core: Mutex::new(Core { machine, how: Some(how), outcome: None, committed }),
            cancel: CancellationToken::new(),
            ended: watch::Sender::new(None),
            progress: watch::Sender::new(None),
            shared,
        }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The locked half of a step: no foreign code, no other lock.
    pub(super) fn step(&self, input: Input, mut outcome: Option<Outcome>) -> Todo {
        let mut core = self.core();
        let effects = core.machine.step(input);
        let mut todo = Todo { answers: effects, ..Todo::default() };
        for effect in effects {
            match effect {
                Effect::KeepOutcome => core.outcome = outcome.take(),
                Effect::Deliver => {
                    todo.deliver = core.how.take().zip(core.outcome.clone());
                }
                // Dropped outside the lock: a callback's captures are foreign code too.
                Effect::Forget => todo.dropped = core.how.take(),
                _ => {}
            }
        }
        todo
    }

    /// The other half, without any lock.
    pub(super) fn perform(self: &Arc<Self>, todo: Todo) {
        let Todo { answers, deliver, dropped } = todo;
        drop(dropped);
        if answers.contains(&Effect::TellWork) {
            self.cancel.cancel();
        }
        if let Some((how, outcome)) = deliver {
            self.deliver(how, outcome);
        }
        if answers.contains(&Effect::Forget)
            && let Some(shared) = self.shared.upgrade()
        {
            shared.forget(self);
        }
    }

    pub(super) fn input(self: &Arc<Self>, input: Input, outcome: Option<Outcome>) -> &'static [Effect] {
        let todo = self.step(input, outcome);
        let answers = todo.answers;
        self.perform(todo);
        answers
    }

    fn deliver(self: &Arc<Self>, how: How, outcome: Outcome) {
        let kind = match &outcome {
            Outcome::Completed(_) => EventKind::JobCompleted,
            Outcome::Cancelled(_) => EventKind::JobCancelled,
            Outcome::Failed(_) => EventKind::JobFailed,
        };
        self.publish(kind, &outcome, None);
        self.ended.send_replace(Some(outcome.clone()));
        match how {
            How::Silent => {}
            How::Wait(send) => drop(send.send(outcome)),
            How::Event { tag } => self.publish(EventKind::OperationComplete, &outcome, Some(tag)),
            How::Callback(call) => {
                let delivered = Delivered(self.clone());
                tokio::spawn(async move {
                    // Also if it panics.
                    let _delivered = delivered;
                    call(outcome);
                });
                return;
            }
        }
        self.input(Input::Delivered, None);
    }

    fn publish(&self, kind: EventKind, outcome: &Outcome, tag: Option<String>) {
        let Some(shared) = self.shared.upgrade() else { return };
        let note = OperationNote {
            id: self.id,
            kind: self.spec.kind,
            outcome: outcome.word().into(),
            code: match outcome {
                Outcome::Failed(failure) => Some(failure.code),
                _ => None,
            },
            tag,
        };
        let text = format!("job {}, {}: {}", self.id, self.spec.kind, outcome.message());
        shared.log.publish_about(self.spec.domain.clone(), kind, text, Some(note));
    }

    /// As it stands.
    pub(super) fn job(&self) -> Job {
        let core = self.core();
        let phase = core.machine.phase();
        let state = match (&core.outcome, phase) {
            (Some(Outcome::Completed(_)), _) => JobState::Completed,
            (Some(Outcome::Cancelled(_)), _) => JobState::Cancelled,
            (Some(Outcome::Failed(_)), _) => JobState::Failed,
            (None, Phase::Aborting | Phase::InitiatingAborted) => JobState::Aborting,
            (None, _) => JobState::Running,
        };
        let detail = match (&core.outcome, core.committed) {
            (Some(outcome), _) => outcome.message().to_owned(),
            (None, Some(why)) => format!("cannot be aborted: {why}"),
            (None, None) => String::new(),
        };
        Job {
            id: self.id,
            kind: self.spec.kind,
            domain: self.spec.domain.clone(),
            state,
            started_ms: self.started_ms,
            ran_ms: self.started.elapsed().as_millis() as u64,
            abortable: matches!(phase, Phase::Initiating | Phase::Running),
            detail,
            progress: *self.progress.borrow(),
            initiator: self.spec.initiator,
        }
    }

    /// Why it cannot be aborted.
    pub(super) fn committed(&self) -> Option<&'static str> {
        self.core().committed
    }

    /// How it ended, if it has, also before the initiator knows.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.core().outcome.clone()
    }
}

struct Delivered(Arc<Cell>);

impl Drop for Delivered {
    fn drop(&mut self) {
        self.0.input(Input::Delivered, None);
    }
}

/// The initiating call's handle. Dropping it without [`Self::begun`] means that the initiation failed: the initiator has the error from
/// its own call, the operation is forgotten, its work is told to stop.
#[must_use = "dropping it fails the initiation"]
#[derive(Debug)]
pub struct Initiation {
    pub(super) cell: Arc<Cell>,
    pub(super) decided: bool,
}

impl Initiation {
    /// The initiation has succeeded: from now on, and maybe before this returns, the completion may come.
    pub fn begun(mut self) -> OperationId {
        self.decided = true;
        self.cell.input(Input::Begun, None);
        self.cell.id
    }

    /// To follow how far it is.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Option<Progress>> {
        self.cell.progress.subscribe()
    }

    /// The operation's name.
    #[must_use]
    pub fn id(&self) -> OperationId {
        self.cell.id
    }
}

impl Drop for Initiation {
    fn drop(&mut self) {
        if !self.decided {
            self.cell.input(Input::InitiationFailed, None);
        }
    }
}

/// The work's handle. Dropping it without [`Self::complete`] completes the operation as failed, so that a panic is heard of.
#[derive(Debug)]
pub struct Work {
    pub(super) cell: Arc<Cell>,
    pub(super) completed: bool,
}

impl Work {
    /// Ends the operation. Nothing happens if the daemon's end has given it up before.
    pub fn complete(mut self, outcome: Outcome) {
        self.completed = true;
        self.cell.input(Input::WorkEnded, Some(outcome));
    }

    /// Ends when the operation is to give up. Stays pending for one that is never to.
    pub async fn aborted(&self) {
        self.cell.cancel.cancelled().await;
    }

    /// Whether it is to give up.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.cell.cancel.is_cancelled()
    }

    /// From here on it cannot be aborted, because. `false`: an abort was faster, it has to give up.
    #[must_use = "an abort may have been faster"]
    pub fn point_of_no_return(&self, why: &'static str) -> bool {
        let mut core = self.cell.core();
        let proceed = core.machine.step(Input::PointOfNoReturn).contains(&Effect::Proceed);
        if proceed {
            core.committed = Some(why);
        }
        proceed
    }

    /// Says how far it is.
    pub fn progress(&self, progress: Progress) {
        self.cell.progress.send_replace(Some(progress));
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.completed {
            let text = "its task has ended without a word, which is a bug of remusd; see the log";
            self.cell.input(Input::WorkEnded, Some(Outcome::Failed(Failure::new(ErrorCode::Failed, text))));
        }
    }
}
