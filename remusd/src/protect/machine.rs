//! The primary's state machine (DESIGN section 2; rules R1, R2, R3, R6, R9).
//!
//! Sans-IO: events in, actions out, no clock, no socket. The driver carries out the actions in the order given and
//! reports each one's end as an event. `states.md` beside this file is every state against every event, kept true by a
//! test.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Epoch;

/// What the primary does when it has lost the backup and no witness is configured: the token is the primary's (hazard F19).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum OnBackupLoss {
    /// The guest goes on alone, held output flows.
    #[default]
    Alone,
    /// The guest goes on but its output stays held until an operator decides.
    Hold,
}

/// The settings that the machine decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// See [`OnBackupLoss`].
    pub on_backup_loss: OnBackupLoss,
    /// Arm the next epoch once an unarmed one had at most this many pages.
    pub arm_pages: u64,
    /// Arm after this many unarmed epochs (the first copy counts) even if they stay large. At least 1.
    pub max_unarmed: u64,
    /// How often in a row a guest may fail to suspend before protection ends.
    pub suspend_retries: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { on_backup_loss: OnBackupLoss::Alone, arm_pages: 16 * 1024, max_unarmed: 6, suspend_retries: 3 }
    }
}

/// How a guest ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestEnd {
    /// Shutdown reason 0.
    Poweroff,
    /// Shutdown reason 1.
    Reboot,
    /// Shutdown reason 3.
    Crash,
    /// Shutdown reason 4.
    Watchdog,
    /// The domain does not exist any more: somebody destroyed it.
    Gone,
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Poweroff => "poweroff",
            Self::Reboot => "reboot",
            Self::Crash => "crash",
            Self::Watchdog => "watchdog",
            Self::Gone => "destroyed",
        })
    }
}

/// Why a STOP is sent to the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopWhy {
    /// An operator asked for it.
    Planned,
    /// The guest ended by itself.
    GuestEnded(GuestEnd),
    /// Checkpointing cannot go on; the guest can.
    Failed(String),
}

/// How a protection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was begun that is not undone; the guest runs on as before.
    NotStarted(String),
    /// Stopped as asked; no copy is left at the backup.
    Stopped,
    /// The guest runs on here, unprotected.
    Alone(String),
    /// The guest ended by itself and the end is recorded.
    GuestEnded(GuestEnd),
    /// The other host's copy runs; this one is sealed and destroyed.
    Superseded(String),
}

/// Where the protection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Link and devices are being set up; nothing of the guest is touched.
    Starting,
    /// Epoch 0's live pass: pages are sent while the guest runs.
    FirstCopy,
    /// The guest has been asked to suspend.
    Suspending(Epoch),
    /// The guest did not suspend; it runs, a new try is on the timer. The engine waits.
    Retrying(Epoch),
    /// The guest stands still: devices close the epoch, the engine copies.
    Capturing(Epoch),
    /// The copy is complete: devices prepare, the guest is let go.
    Resuming(Epoch),
    /// The guest runs; the epoch is on its way or waits for its acknowledgement.
    Shipping(Epoch),
    /// The acknowledgement is here; devices release the epoch's output.
    Committing(Epoch),
    /// The interval timer runs.
    Idle(Epoch),
    /// STOP is sent; its confirmation is awaited. Output stays held.
    Stopping(StopWhy),
    /// The backup is lost; it is being decided who owns the guest. Output stays held.
    Arbitrating(StopWhy),
    /// The backup is lost and policy or the witness keeps output held until an operator decides.
    Holding(StopWhy),
    /// Everything is being put back.
    CleaningUp(Outcome),
    /// Over.
    Ended(Outcome),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Link agreed and devices set up.
    Started,
    /// Link or devices could not be set up.
    StartFailed(String),
    /// The engine wants the guest suspended.
    EngineSuspend,
    /// The engine has copied everything and wants the guest resumed.
    EngineCopied,
    /// The engine waits to be told to go on with the next epoch.
    EngineWaiting,
    /// The engine failed or ended.
    EngineFailed(String),
    /// The guest is suspended.
    GuestSuspended,
    /// The guest did not suspend in time; the request is withdrawn and it runs.
    SuspendFailed(String),
    /// All devices have closed the epoch.
    Postsuspended,
    /// All devices are ready for the guest.
    Preresumed,
    /// The guest runs again.
    Resumed,
    /// A device, resume or the deadline of the suspended section failed the epoch; text says which.
    EpochFailed(String),
    /// The backup holds this epoch. `pages` is what the epoch had, for arming.
    Ack {
        /// Which epoch.
        epoch: Epoch,
        /// Pages in it.
        pages: u64,
    },
    /// The backup answers but this epoch's acknowledgement is late (hazard F22).
    AckLate,
    /// Devices have released the epoch.
    Committed,
    /// Interval or retry timer.
    Timer,
    /// The backup cannot be reached or has said that it can hold no copy any more.
    BackupLost(String),
    /// Arbitration: this host owns the guest.
    ClaimWon,
    /// Arbitration: the other host owns the guest.
    ClaimLost(String),
    /// Arbitration: nobody knows; ask again or wait for the operator.
    ClaimUnknown,
    /// The backup's copy has been activated.
    Superseded(String),
    /// An operator wants protection ended.
    StopRequested,
    /// The backup has destroyed its copy.
    Stopped,
    /// No confirmation of STOP came.
    StopLate,
    /// The guest ended by itself.
    GuestEnded(GuestEnd),
    /// Cleaning up is done.
    CleanedUp,
}

/// What becomes of held output and of the gates when devices are put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// We own the guest: held output flows, everything is put back.
    Release,
    /// We do not: held output is dropped, the vifs stay sealed.
    Discard,
}

/// What becomes of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainFate {
    /// It runs on.
    Keep,
    /// What its configuration says for this end.
    ByConfig(GuestEnd),
    /// It is destroyed: another copy is active.
    Destroy,
}

/// What the driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the capture engine.
    StartEngine,
    /// Arm the devices if this is the first armed epoch, then ask the guest to suspend.
    Suspend {
        /// Which epoch ends here.
        epoch: Epoch,
        /// Whether output is held from here on.
        armed: bool,
    },
    /// Close the epoch at every device.
    Postsuspend(Epoch),
    /// Let the engine copy.
    EngineCopy,
    /// Let every device prepare for the guest.
    Preresume(Epoch),
    /// Resume the guest.
    Resume,
    /// Tell the engine that the guest runs.
    EngineResumed,
    /// Send what is left of the epoch and `EPOCH_END`; watch for the acknowledgement.
    FinishEpoch {
        /// Which epoch.
        epoch: Epoch,
        /// As in [`Action::Suspend`].
        armed: bool,
    },
    /// Release the epoch at every device.
    Commit(Epoch),
    /// Start the interval (or retry) timer.
    StartTimer,
    /// Let the engine begin the next epoch.
    EngineContinue,
    /// Whatever the guest's state, make it run: retract a pending suspend, resume it if suspended.
    EnsureRunning,
    /// Decide who owns the guest. Answered by `ClaimWon`, `ClaimLost` or `ClaimUnknown`.
    Arbitrate,
    /// Tell the backup to destroy its copy; start waiting for its confirmation.
    SendStop(StopWhy),
    /// Stop the guest's vCPUs at once: it does not own itself any more.
    Freeze,
    /// Put devices and the engine back, decide the domain's fate. Answered by `CleanedUp`.
    CleanUp {
        /// What becomes of held output.
        output: Output,
        /// What becomes of the domain.
        fate: DomainFate,
    },
    /// Protection holds from this epoch on.
    ReportProtected(Epoch),
    /// An unarmed epoch is over.
    ReportUnarmed(Epoch),
    /// ALARM: no backup.
    ReportUnprotected(String),
    /// Output is held until an operator decides.
    ReportHolding(String),
    /// An epoch was given up.
    ReportAbandoned(String),
    /// The other host's copy won.
    ReportSuperseded(String),
    /// The guest ended by itself.
    ReportGuestEnded(GuestEnd),
    /// The machine is done; no event is looked at any more.
    End(Outcome),
}

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
