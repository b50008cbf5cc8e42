//! The primary's state machine (DESIGN section 2; rules R1, R2, R3, R6, R9).
//!
//! Sans-IO: events in, actions out, no clock, no socket. The driver carries out the actions in the order given and
//! reports each one's end as an event. `states.md` beside this file is every state against every event, kept true by a
//! test. `token` agrees with the backup on who decides, `ending` decides who owns the guest, `handover` is the switchover.

mod ending;
mod handover;
mod token;
mod types;

use crate::enforced::enforced;
use crate::ids::Epoch;
use crate::link::Token;

pub use types::{
    Action, Agreement, DomainFate, Event, GuestEnd, Handover, Kept, OnBackupLoss, Outcome, Output, Policy, State,
    StopWhy,
};

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
    /// Whether the devices could be armed: their disks' copies are alike.
    devices_ready: bool,
    /// Our mode. It is the stricter one while an agreement is under way: the witness's from before the backup hears of it until after
    /// the backup has given it up durably.
    token: Token,
    agreement: Agreement,
    /// Whether the witness answers, as far as known.
    witness_up: bool,
    /// The witness refused to arm; not asked again until it has been away.
    arm_refused: bool,
    arm_id: u64,
    token_seq: u64,
    handover: Handover,
    /// The guest stands still for a switchover.
    still: bool,
    /// The guest's vCPUs are stopped because another copy may run.
    frozen: bool,
    /// The backup cannot be reached any more.
    link_lost: bool,
    /// The record says stopped.
    stop_recorded: bool,
    /// The guest runs on an operator's word and the record does not say so yet.
    unrecorded: bool,
}

type Actions = Vec<Action>;

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
            devices_ready: true,
            token: Token::Primary,
            agreement: Agreement::Agreed,
            witness_up: policy.witness,
            arm_refused: false,
            arm_id: 0,
            token_seq: 0,
            handover: Handover::No,
            still: false,
            frozen: false,
            link_lost: false,
            stop_recorded: false,
            unrecorded: false,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The mode that counts here.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// How far the agreement with the backup on the mode is.
    #[must_use]
    pub fn agreement(&self) -> Agreement {
        self.agreement
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
                    | State::ShippingLast(_)
                    | State::CommittingLast(_)
            )
    }

    fn armed(&self, epoch: Epoch) -> bool {
        self.armed_from.is_some_and(|from| epoch >= from)
    }

    /// Whether the devices could be armed now, as far as known (R4: never before a disk's synchronisation has finished).
    pub fn devices_are_ready(&mut self, ready: bool) {
        self.devices_ready = ready;
    }

    /// Whether a later epoch will be the first armed one.
    #[must_use]
    pub fn is_unarmed(&self) -> bool {
        self.armed_from.is_none()
    }

    /// Decides at an epoch's suspend whether it is armed (hazard F10: never the first copy; never before both sides know who decides).
    fn arm_if_converged(&mut self, epoch: Epoch) {
        let small = self.last_pages <= self.policy.arm_pages;
        let long_enough = epoch.0 >= self.policy.max_unarmed.max(1);
        let ready = self.devices_ready && self.agreed();
        if self.armed_from.is_none() && epoch.0 > 0 && ready && (small || long_enough) {
            self.armed_from = Some(epoch);
        }
    }

    fn suspend(&mut self, epoch: Epoch) -> Actions {
        self.arm_if_converged(epoch);
        let mut actions = self.leave_if_asked(epoch);
        self.state = State::Suspending(epoch);
        actions.push(Action::Suspend { epoch, armed: self.armed(epoch) });
        actions
    }

    /// The guest must run before anything else happens, then the backup is told to give its copy up.
    fn fail_suspended(&mut self, text: String) -> Actions {
        self.still = false;
        let mut actions = vec![Action::EnsureRunning, Action::ReportAbandoned(text.clone())];
        actions.extend(self.stop(StopWhy::Failed(text)));
        actions
    }

    /// Takes one event; returns what to do, in order. An event that means nothing in this state changes nothing.
    pub fn step(&mut self, event: Event) -> Actions {
        use Event as E;
        use State as S;
        match &event {
            E::WitnessUp => self.witness_up = true,
            E::WitnessDown(_) => {
                self.witness_up = false;
                self.arm_refused = false;
            }
            E::BackupLost(_) => self.link_lost = true,
            _ => {}
        }
        match (self.state.clone(), event) {
            // Over, or nearly: only the end of cleaning up counts.
            (S::Ended(_), _) => vec![],
            (S::CleaningUp(outcome), E::CleanedUp) => self.cleaned_up(outcome),
            (S::CleaningUp(_), _) => vec![],
            (S::Unrecorded(outcome), event) => self.unrecorded(&outcome, event),

            (S::Starting, E::Started) => {
                self.state = S::FirstCopy;
                let mut actions = vec![Action::StartEngine];
                actions.extend(self.agree("protection begins"));
                actions
            }
            (S::Starting, E::Superseded(text) | E::StartFailed(text) | E::BackupLost(text)) => self.not_started(text),
            (S::Starting, E::StopRequested) => self.not_started("stopped by an operator".into()),
            (S::Starting, E::GuestEnded(end)) => self.not_started(format!("the guest ended: {end}")),
            (S::Starting, E::HandoverRequested) => self.refuse_handover(),
            (S::Starting, _) => vec![],

            // The other copy runs: nothing else matters (R3).
            (_, E::Superseded(text)) => self.superseded(text),

            // Who owns the guest?
            (S::Recording(why), event) => self.recording(why, event),
            (S::Stopping(why), event) => self.stopping(why, event),
            (S::Arbitrating(why), event) => self.arbitrating(why, event),
            (S::Holding(why), event) => self.holding(why, event),
            (S::Yielding(why), event) => self.yielding(why, event),
            (S::ShippingLast(epoch), event) => self.shipping_last(epoch, event),
            (S::CommittingLast(epoch), event) => self.committing_last(epoch, event),
            (S::HandingOver(epoch), event) => self.handing_over(epoch, event),
            (S::HandedOver(_), event) => self.handed_over(event),

            // The guest ended by itself: record the stop before anything else (hazard F24).
            (_, E::GuestEnded(end)) => self.stop(StopWhy::GuestEnded(end)),
            (
                _,
                event @ (E::WitnessUp
                | E::WitnessDown(_)
                | E::RecordArmed { .. }
                | E::ArmRefused { .. }
                | E::TokenSaved
                | E::TokenUnsaved(_)
                | E::TokenAck { .. }),
            ) => self.on_token(event),
            (_, E::HandoverRequested) => self.ask_handover(),

            (S::Suspending(_) | S::Capturing(_) | S::Resuming(_), event) => self.guest_still(event),
            (S::FirstCopy | S::Retrying(_) | S::Shipping(_) | S::Committing(_) | S::Idle(_), event) => {
                self.guest_runs(event)
            }
        }
    }

    /// The guest stands still, or may: it runs again before anything else (R6).
    fn guest_still(&mut self, event: Event) -> Actions {
        use Event as E;
        use State as S;
        match (self.state.clone(), event) {
            (_, E::BackupLost(text)) => self.lost(text, Some(Action::EnsureRunning)),
            (_, E::EngineFailed(text) | E::EpochFailed(text)) => self.fail_suspended(text),
            (_, E::StopRequested) => {
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
            (S::Capturing(epoch), E::EngineCopied) => self.copied(epoch),
            (S::Resuming(_), E::Preresumed) => vec![Action::Resume],
            (S::Resuming(epoch), E::Resumed) => self.resumed(epoch),
            _ => vec![],
        }
    }

    fn copied(&mut self, epoch: Epoch) -> Actions {
        if self.handover == Handover::Leaving && self.pending_stop.is_none() {
            return self.stay_still(epoch);
        }
        self.state = State::Resuming(epoch);
        vec![Action::Preresume(epoch)]
    }

    fn resumed(&mut self, epoch: Epoch) -> Actions {
        self.still = false;
        if let Some(why) = self.pending_stop.take() {
            return self.stop(why);
        }
        if self.handover == Handover::Aborting {
            // This epoch is acknowledged and committed already.
            self.handover = Handover::No;
            self.state = State::Idle(epoch);
            let mut actions = vec![Action::StartTimer];
            actions.extend(self.agree("the switchover was called off"));
            return actions;
        }
        self.state = State::Shipping(epoch);
        vec![Action::EngineResumed]
    }

    fn guest_runs(&mut self, event: Event) -> Actions {
        use Event as E;
        use State as S;
        match (self.state.clone(), event) {
            (_, E::BackupLost(text)) => self.lost(text, None),
            (_, E::EngineFailed(text) | E::EpochFailed(text)) => self.stop(StopWhy::Failed(text)),
            (_, E::StopRequested) => self.stop(StopWhy::Planned),
            (S::FirstCopy, E::EngineSuspend) => self.suspend(Epoch(0)),
            (S::Retrying(epoch), E::Timer) => self.suspend(epoch),
            (S::Shipping(epoch), E::EngineWaiting) => {
                let armed = self.armed(epoch) || !enforced("R1-armed-means-held");
                vec![Action::FinishEpoch { epoch, armed }]
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
            _ => vec![],
        }
    }

    fn not_started(&mut self, text: String) -> Actions {
        self.state = State::CleaningUp(Outcome::NotStarted(text));
        vec![Action::CleanUp { output: Output::Release, fate: DomainFate::Keep, kept: Kept::Forget }]
    }
}

#[cfg(test)]
mod tests;
