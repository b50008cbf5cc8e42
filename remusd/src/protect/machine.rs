//! The primary's state machine (DESIGN section 2; rules R1, R2, R3, R6, R9).
//!
//! Sans-IO: events in, actions out, no clock, no socket. The driver carries out the actions in the order given and
//! reports each one's end as an event. `states.md` beside this file is every state against every event, kept true by a
//! test.

mod types;

use crate::ids::Epoch;

pub use types::{Action, DomainFate, Event, GuestEnd, OnBackupLoss, Outcome, Output, Policy, State, StopWhy};

/// The primary's state machine. See the module.
#[derive(Clone, Debug)]
pub struct Machine {
    state: State,
    policy: Policy,
    /// First armed epoch, once decided.
    armed_from: Option<Epoch>,
    /// Whether the first armed epoch is acknowledged.
    protected: bool,
    /// A stop that waits until the guest runs again.
    pending_stop: Option<StopWhy>,
    suspend_failures: u32,
    last_pages: u64,
}

impl Machine {
    /// A machine in [`State::Starting`].
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            state: State::Starting,
            policy,
            armed_from: None,
            protected: false,
            pending_stop: None,
            suspend_failures: 0,
            last_pages: u64::MAX,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether the loss of this host would now be survived: the first armed epoch is acknowledged and the backup is not lost.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.protected
            && matches!(
                self.state,
                State::Suspending(_)
                    | State::Retrying(_)
                    | State::Capturing(_)
                    | State::Resuming(_)
                    | State::Shipping(_)
                    | State::Committing(_)
                    | State::Idle(_)
            )
    }

    fn armed(&self, epoch: Epoch) -> bool {
        self.armed_from.is_some_and(|from| epoch >= from)
    }

    /// Decides at an epoch's suspend whether it is armed (hazard F10: never the first copy).
    fn arm_if_converged(&mut self, epoch: Epoch) {
        let small = self.last_pages <= self.policy.arm_pages;
        let long_enough = epoch.0 >= self.policy.max_unarmed.max(1);
        if self.armed_from.is_none() && epoch.0 > 0 && (small || long_enough) {
            self.armed_from = Some(epoch);
        }
    }

    fn suspend(&mut self, epoch: Epoch) -> Vec<Action> {
        self.arm_if_converged(epoch);
        self.state = State::Suspending(epoch);
        vec![Action::Suspend { epoch, armed: self.armed(epoch) }]
    }

    fn stop(&mut self, why: StopWhy) -> Vec<Action> {
        self.state = State::Stopping(why.clone());
        vec![Action::SendStop(why)]
    }

    fn lost(&mut self, text: String, before: Option<Action>) -> Vec<Action> {
        self.state = State::Arbitrating(StopWhy::Failed(text));
        before.into_iter().chain([Action::Arbitrate]).collect()
    }

    /// The guest must run before anything else happens, then the backup is told to give its copy up.
    fn fail_suspended(&mut self, text: String) -> Vec<Action> {
        let mut actions = vec![Action::EnsureRunning, Action::ReportAbandoned(text.clone())];
        actions.extend(self.stop(StopWhy::Failed(text)));
        actions
    }

    /// We own the guest: everything is put back and held output flows.
    fn own(&mut self, why: StopWhy) -> Vec<Action> {
        let (outcome, report, fate) = match why {
            StopWhy::Planned => (Outcome::Stopped, None, DomainFate::Keep),
            StopWhy::GuestEnded(end) => {
                (Outcome::GuestEnded(end), Some(Action::ReportGuestEnded(end)), DomainFate::ByConfig(end))
            }
            StopWhy::Failed(text) => {
                (Outcome::Alone(text.clone()), Some(Action::ReportUnprotected(text)), DomainFate::Keep)
            }
        };
        self.state = State::CleaningUp(outcome);
        let mut actions = vec![Action::CleanUp { output: Output::Release, fate }];
        actions.extend(report);
        actions
    }

    fn superseded(&mut self, text: String) -> Vec<Action> {
        self.state = State::CleaningUp(Outcome::Superseded(text.clone()));
        vec![
            Action::Freeze,
            Action::CleanUp { output: Output::Discard, fate: DomainFate::Destroy },
            Action::ReportSuperseded(text),
        ]
    }

    /// Takes one event; returns what to do, in order. An event that means nothing in this state changes nothing.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        use Event as E;
        use State as S;
        match (self.state.clone(), event) {
            // Over, or nearly: only the end of cleaning up counts.
            (S::Ended(_), _) => vec![],
            (S::CleaningUp(outcome), E::CleanedUp) => {
                self.state = S::Ended(outcome.clone());
                vec![Action::End(outcome)]
            }
            (S::CleaningUp(_), _) => vec![],

            // The other copy runs: nothing else matters (R3).
            (S::Starting, E::Superseded(text) | E::StartFailed(text) | E::BackupLost(text)) => self.not_started(text),
            (_, E::Superseded(text) | E::ClaimLost(text)) => self.superseded(text),

            (S::Starting, E::Started) => {
                self.state = S::FirstCopy;
                vec![Action::StartEngine]
            }
            (S::Starting, E::StopRequested) => self.not_started("stopped by an operator".into()),
            (S::Starting, E::GuestEnded(end)) => self.not_started(format!("the guest ended: {end}")),
            (S::Starting, _) => vec![],

            // Who owns the guest?
            (S::Arbitrating(why) | S::Holding(why), E::ClaimWon) => {
                // Best effort: a backup that still hears us must not keep a copy that is stale from here on (R4).
                let mut actions = vec![Action::SendStop(why.clone())];
                actions.extend(self.own(why));
                actions
            }
            (S::Arbitrating(why), E::ClaimUnknown) => {
                let text = match &why {
                    StopWhy::Failed(text) => text.clone(),
                    StopWhy::Planned => "the backup did not confirm the stop".into(),
                    StopWhy::GuestEnded(end) => format!("the guest ended ({end}) and the backup did not confirm"),
                };
                self.state = S::Holding(why);
                vec![Action::ReportHolding(text)]
            }
            (S::Holding(_), E::StopRequested) => {
                // The operator says: this copy goes on.
                let mut actions = vec![Action::SendStop(StopWhy::Planned)];
                actions.extend(self.own(StopWhy::Planned));
                actions
            }
            (S::Arbitrating(_), E::GuestEnded(end)) => {
                self.state = S::Arbitrating(StopWhy::GuestEnded(end));
                vec![]
            }
            (S::Holding(_), E::GuestEnded(end)) => {
                self.state = S::Holding(StopWhy::GuestEnded(end));
                vec![]
            }
            // Late, but the backup holds no copy any more: nobody else can own the guest.
            (S::Arbitrating(why) | S::Holding(why), E::Stopped) => self.own(why),
            (S::Arbitrating(_) | S::Holding(_), _) => vec![],

            // A stop is under way.
            (S::Stopping(why), E::Stopped) => self.own(why),
            (S::Stopping(why), E::StopLate | E::BackupLost(_)) => {
                self.state = S::Arbitrating(why);
                vec![Action::Arbitrate]
            }
            (S::Stopping(_), E::GuestEnded(end)) => {
                self.state = S::Stopping(StopWhy::GuestEnded(end));
                vec![]
            }
            (S::Stopping(_), _) => vec![],

            // The guest ended by itself: record the stop before anything else (hazard F24).
            (_, E::GuestEnded(end)) => self.stop(StopWhy::GuestEnded(end)),

            // The guest stands still, or may: it runs again before anything else (R6).
            (S::Suspending(_) | S::Capturing(_) | S::Resuming(_), E::BackupLost(text)) => {
                self.lost(text, Some(Action::EnsureRunning))
            }
            (S::Suspending(_) | S::Capturing(_) | S::Resuming(_), E::EngineFailed(text) | E::EpochFailed(text)) => {
                self.fail_suspended(text)
            }
            (S::Suspending(_) | S::Capturing(_) | S::Resuming(_), E::StopRequested) => {
                self.pending_stop = Some(StopWhy::Planned);
                vec![]
            }
            (S::Suspending(epoch), E::GuestSuspended) => {
                self.suspend_failures = 0;
                self.state = S::Capturing(epoch);
                vec![Action::Postsuspend(epoch)]
            }
            (S::Suspending(epoch), E::SuspendFailed(text)) => {
                self.suspend_failures += 1;
                if let Some(why) = self.pending_stop.take() {
                    return self.stop(why);
                }
                if self.suspend_failures > self.policy.suspend_retries {
                    return self.stop(StopWhy::Failed(text));
                }
                self.state = S::Retrying(epoch);
                vec![Action::ReportAbandoned(text), Action::StartTimer]
            }
            (S::Capturing(_), E::Postsuspended) => vec![Action::EngineCopy],
            (S::Capturing(epoch), E::EngineCopied) => {
                self.state = S::Resuming(epoch);
                vec![Action::Preresume(epoch)]
            }
            (S::Resuming(_), E::Preresumed) => vec![Action::Resume],
            (S::Resuming(epoch), E::Resumed) => match self.pending_stop.take() {
                Some(why) => self.stop(why),
                None => {
                    self.state = S::Shipping(epoch);
                    vec![Action::EngineResumed]
                }
            },
            (S::Suspending(_) | S::Capturing(_) | S::Resuming(_), _) => vec![],

            // The guest runs.
            (S::FirstCopy | S::Retrying(_) | S::Shipping(_) | S::Committing(_) | S::Idle(_), E::BackupLost(text)) => {
                self.lost(text, None)
            }
            (
                S::FirstCopy | S::Retrying(_) | S::Shipping(_) | S::Committing(_) | S::Idle(_),
                E::EngineFailed(text) | E::EpochFailed(text),
            ) => self.stop(StopWhy::Failed(text)),
            (S::FirstCopy | S::Retrying(_) | S::Shipping(_) | S::Committing(_) | S::Idle(_), E::StopRequested) => {
                self.stop(StopWhy::Planned)
            }
            (S::FirstCopy, E::EngineSuspend) => self.suspend(Epoch(0)),
            (S::Retrying(epoch), E::Timer) => self.suspend(epoch),
            (S::Shipping(epoch), E::EngineWaiting) => {
                vec![Action::FinishEpoch { epoch, armed: self.armed(epoch) }]
            }
            (S::Shipping(epoch), E::Ack { epoch: acked, pages }) if acked == epoch => {
                self.last_pages = pages;
                self.state = S::Committing(epoch);
                vec![Action::Commit(epoch)]
            }
            (S::Shipping(epoch), E::Ack { epoch: acked, .. }) => {
                self.stop(StopWhy::Failed(format!("the backup acknowledged epoch {acked} while {epoch} was sent")))
            }
            (S::Shipping(_), E::AckLate) => {
                self.stop(StopWhy::Failed("the backup answers but does not acknowledge the epoch".into()))
            }
            (S::Committing(epoch), E::Committed) => {
                self.state = S::Idle(epoch);
                let mut actions = vec![];
                if !self.armed(epoch) {
                    actions.push(Action::ReportUnarmed(epoch));
                } else if !self.protected {
                    self.protected = true;
                    actions.push(Action::ReportProtected(epoch));
                }
                actions.push(Action::StartTimer);
                actions
            }
            (S::Idle(_), E::Timer) => vec![Action::EngineContinue],
            (S::Idle(epoch), E::EngineSuspend) => self.suspend(epoch.next()),
            (S::FirstCopy | S::Retrying(_) | S::Shipping(_) | S::Committing(_) | S::Idle(_), _) => vec![],
        }
    }

    fn not_started(&mut self, text: String) -> Vec<Action> {
        self.state = State::CleaningUp(Outcome::NotStarted(text));
        vec![Action::CleanUp { output: Output::Release, fate: DomainFate::Keep }]
    }
}

#[cfg(test)]
mod tests;
