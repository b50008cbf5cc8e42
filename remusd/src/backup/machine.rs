//! Decides, for one incoming protection, what is acknowledged, fed, activated and destroyed. Sans-IO.
//!
//! The rules of DESIGN section 3 that live here: R2 (whole epochs, acknowledging stops before activation begins), R4 (nothing
//! before the first armed epoch), R7 (nothing unverified is acknowledged or applied after arming), R9 (no end of a link or process activates).

use std::collections::VecDeque;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::staging::{StageError, Staging};
use crate::ids::Epoch;
use crate::link::{EpochEnd, ErrorCode, Frame, LostReason, OnPrimaryLoss, StopReason};
use crate::stream::{PageBatch, Record};

/// Where an incoming protection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No armed epoch is whole yet: the copy cannot be activated.
    Syncing,
    /// An armed epoch is whole: the copy can be activated. The session is open.
    Armed,
    /// As armed, but the session has ended: the copy waits for a decision.
    Waiting,
    /// The newest whole epoch's state and END are given to the receiver, which builds the domain. Nothing is acknowledged from here on.
    Activating,
    /// The domain is built; the witness is asked who owns it.
    Claiming,
    /// The receiver was told to go.
    Starting,
    /// The copy runs here.
    Active,
    /// The receiver is being ended and the incoming domain destroyed.
    Discarding,
    /// Nothing is left of the copy.
    Discarded,
}

/// On whose word a copy is activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authority {
    /// An operator asserted that the primary is off.
    Operator,
    /// The protection was made with `on_primary_loss=activate`.
    Policy,
    /// The witness decides.
    Witness,
}

/// Settings of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What the primary asked for at `HELLO`.
    pub on_primary_loss: OnPrimaryLoss,
    /// Whether a witness decides about ownership.
    pub witness: bool,
    /// Most bytes of one staged epoch.
    pub staging_limit: usize,
    /// Most epochs before the newest that the receiver may not have taken in yet when it is acknowledged (hazard F11).
    pub backlog_epochs: usize,
    /// Most bytes of those epochs.
    pub backlog_bytes: u64,
}

/// What happens to a protection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The primary sent a frame.
    Frame(Frame),
    /// The receiver has taken in all of this epoch and of those before it.
    Drained(Epoch),
    /// Asked by [`Action::CheckAlive`]: receiver and incoming domain are there.
    Alive(Epoch),
    /// The receiver has built the domain and waits for GO.
    CopyReady,
    /// The copy runs.
    CopyRuns,
    /// The receiver or the incoming domain is gone, or could not be fed.
    ReceiverDied(String),
    /// Nothing was heard from the primary for the detection time, counted on after the session's end.
    PrimarySuspect,
    /// A suspected primary was heard again.
    PrimaryAlive,
    /// The session has ended.
    LinkClosed(String),
    /// An operator wants the copy activated.
    OperatorFailover {
        /// The operator asserts that the primary host is off.
        primary_is_off: bool,
    },
    /// An operator wants the copy destroyed.
    OperatorDiscard,
    /// The witness gave us the protection.
    ClaimWon,
    /// The witness gave it to somebody else.
    ClaimLost(String),
    /// The witness's answer is unknown: neither won nor lost.
    ClaimUnknown,
    /// The primary has opened a newer session for the same protection.
    Replaced,
    /// This daemon ends.
    Shutdown,
    /// Nothing is left of receiver and incoming domain.
    Destroyed,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give the receiver configuration and preamble.
    FeedHead {
        /// xl's JSON.
        config: Bytes,
        /// libxc's headers and static records.
        preamble: Bytes,
    },
    /// Give the receiver pages.
    FeedPages(PageBatch),
    /// All of this epoch is given; tell when it is taken in.
    FeedMark(Epoch),
    /// Look whether receiver and incoming domain are there; answer [`Event::Alive`] or [`Event::ReceiverDied`].
    CheckAlive(Epoch),
    /// Send a frame to the primary, if the session is open.
    Send(Frame),
    /// End the session after what was sent.
    CloseLink,
    /// Give the receiver this state and END.
    FinishCopy {
        /// The epoch that will run.
        epoch: Epoch,
        /// Its state.
        state: Vec<Record>,
    },
    /// Ask the witness, or ask again after a while.
    Claim,
    /// Tell the witness that the claim is given up.
    Forfeit,
    /// Tell the receiver to rename and unpause its copy.
    Go,
    /// End the receiver and destroy the incoming domain; answer [`Event::Destroyed`], however long that takes.
    DestroyCopy,
    /// Refuse the operator's command with this sentence.
    Refuse(String),
    /// Tell the world.
    Report(Report),
}

/// News about a protection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The first armed epoch is whole.
    Armed(Epoch),
    /// Nothing is heard from the primary; what follows from it.
    Suspect(String),
    /// The session has ended but the copy is kept; why, and what can be done.
    Waiting(String),
    /// The copy is being activated.
    Activating(Epoch, Authority),
    /// The copy runs.
    Active(Epoch),
    /// The copy could not be activated.
    ActivationFailed(String),
    /// The copy was destroyed.
    Discarded(String),
}

/// One incoming protection.
#[derive(Debug)]
pub struct Machine {
    state: State,
    policy: Policy,
    staging: Staging,
    config: Option<Bytes>,
    head_fed: bool,
    acked: Option<Epoch>,
    checking: Option<Epoch>,
    /// Whole epochs that the receiver has not taken in, with their bytes.
    backlog: VecDeque<(Epoch, u64)>,
    suspect: bool,
    /// We ended the session by our own fault: no activation without an operator, as the primary goes on alone.
    gave_up: bool,
    authority: Authority,
    stop: Option<StopReason>,
    why: String,
}

type Actions = Vec<Action>;

impl Machine {
    /// A protection whose session is open and whose receiver waits for data.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            state: State::Syncing,
            staging: Staging::new(policy.staging_limit),
            policy,
            config: None,
            head_fed: false,
            acked: None,
            checking: None,
            backlog: VecDeque::new(),
            suspect: false,
            gave_up: false,
            authority: Authority::Operator,
            stop: None,
            why: String::new(),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The newest acknowledged epoch.
    #[must_use]
    pub fn acked(&self) -> Option<Epoch> {
        self.acked
    }

    /// The newest whole epoch.
    #[must_use]
    pub fn whole(&self) -> Option<Epoch> {
        self.staging.whole()
    }

    /// Whether an armed epoch is whole.
    #[must_use]
    pub fn armed(&self) -> Option<Epoch> {
        self.staging.armed()
    }

    /// Why the copy is being, or was, destroyed.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Whether pages go straight to the receiver, so that reading must wait for it.
    #[must_use]
    pub fn passes_through(&self) -> bool {
        self.staging.passes_through()
    }

    /// Epochs and bytes that the receiver has not taken in.
    #[must_use]
    pub fn backlog(&self) -> (u32, u64) {
        (self.backlog.len() as u32, self.backlog.iter().map(|(_, bytes)| bytes).sum())
    }

    /// Whether losing the primary now would activate the copy without an operator or a witness.
    #[must_use]
    pub fn activates_by_policy(&self) -> bool {
        let may = matches!(self.state, State::Armed | State::Waiting) && !self.gave_up && !self.policy.witness;
        may && self.policy.on_primary_loss == OnPrimaryLoss::Activate
    }

    /// Takes an event; returns what is to be done.
    pub fn step(&mut self, event: Event) -> Actions {
        match event {
            Event::Frame(frame) => self.frame(frame),
            Event::Drained(epoch) => self.drained(epoch),
            Event::Alive(epoch) => self.alive(epoch),
            Event::CopyReady => self.copy_ready(),
            Event::CopyRuns => self.copy_runs(),
            Event::ReceiverDied(text) => self.receiver_died(text),
            Event::PrimarySuspect => self.primary_suspect(),
            Event::PrimaryAlive => {
                self.suspect = false;
                Vec::new()
            }
            Event::LinkClosed(text) => self.link_closed(&text),
            Event::OperatorFailover { primary_is_off } => self.operator_failover(primary_is_off),
            Event::OperatorDiscard => self.operator_discard(),
            Event::ClaimWon => self.claim_won(),
            Event::ClaimLost(text) => self.claim_lost(&text),
            Event::ClaimUnknown => match self.state {
                State::Claiming => vec![Action::Claim],
                _ => Vec::new(),
            },
            Event::Replaced => self.end_unless_started("the primary has opened a newer session", None),
            Event::Shutdown => {
                let text = "remusd on the backup shuts down";
                self.end_unless_started(text, Some(LostReason::Shutdown))
            }
            Event::Destroyed => self.destroyed(),
        }
    }

    fn frame(&mut self, frame: Frame) -> Actions {
        match (self.state, frame) {
            (_, Frame::Heartbeat(_)) if self.state != State::Active => Vec::new(),
            (State::Syncing | State::Armed | State::Waiting | State::Activating, Frame::Stop { reason }) => {
                self.stop = Some(reason);
                let failed = (self.state == State::Activating)
                    .then(|| Report::ActivationFailed("the primary is alive and has stopped the protection".into()));
                let mut actions: Actions = failed.into_iter().map(Action::Report).collect();
                actions.extend(self.discard(format!("the primary ended the protection ({reason:?})")));
                actions
            }
            (State::Syncing | State::Armed, frame) => self.data(frame),
            // The session is over; what was still on its way belongs to nothing (R2).
            (State::Waiting, _) => Vec::new(),
            // Acknowledging has stopped for good; the answer comes when it is known who runs (hazard F9).
            (State::Activating | State::Claiming | State::Starting, _) => Vec::new(),
            (State::Active, _) => vec![Action::Send(self.superseded())],
            (State::Discarding, Frame::Stop { reason }) => {
                self.stop = Some(reason);
                Vec::new()
            }
            (State::Discarding, _) => Vec::new(),
            (State::Discarded, Frame::Stop { .. }) => vec![Action::Send(Frame::Stopped), Action::CloseLink],
            (State::Discarded, _) => Vec::new(),
        }
    }

    fn superseded(&self) -> Frame {
        let epoch = self.staging.whole().map_or_else(String::new, |e| format!(" from epoch {e}"));
        Frame::Superseded { text: format!("the copy was activated{epoch} and runs on the backup") }
    }

    fn data(&mut self, frame: Frame) -> Actions {
        let result = match frame {
            Frame::Config(json) if self.config.is_none() => {
                self.config = Some(json);
                Ok(Vec::new())
            }
            Frame::Preamble(preamble) if !self.head_fed => match self.config.clone() {
                Some(config) => {
                    self.head_fed = true;
                    Ok(vec![Action::FeedHead { config, preamble }])
                }
                None => Err(StageError::Order("PREAMBLE before CONFIG")),
            },
            Frame::EpochBegin { epoch, .. } if self.head_fed => self.staging.begin(epoch).map(|()| Vec::new()),
            Frame::Pages { epoch, batch } => {
                self.staging.pages(epoch, batch).map(|through| through.into_iter().map(Action::FeedPages).collect())
            }
            Frame::State(part) => self.staging.part(&part).map(|()| Vec::new()),
            Frame::EpochEnd(end) => self.epoch_end(&end),
            Frame::EpochBegin { .. } => Err(StageError::Order("EPOCH_BEGIN before PREAMBLE")),
            Frame::Config(_) | Frame::Preamble(_) => Err(StageError::Order("CONFIG or PREAMBLE twice")),
            Frame::Hello(_)
            | Frame::Welcome(_)
            | Frame::Refuse { .. }
            | Frame::QueryResult(_)
            | Frame::Ack { .. }
            | Frame::Heartbeat(_)
            | Frame::Stop { .. }
            | Frame::Stopped
            | Frame::BackupLost { .. }
            | Frame::Superseded { .. }
            | Frame::Error { .. } => Err(StageError::Order("a frame that a primary does not send")),
        };
        result.unwrap_or_else(|error| self.give_up(&error))
    }

    fn epoch_end(&mut self, end: &EpochEnd) -> Result<Actions, StageError> {
        let whole = self.staging.end(end)?;
        let mut actions: Actions = whole.pages.into_iter().map(Action::FeedPages).collect();
        actions.push(Action::FeedMark(whole.epoch));
        self.backlog.push_back((whole.epoch, whole.bytes));
        if whole.armed && self.state == State::Syncing {
            self.state = State::Armed;
            actions.push(Action::Report(Report::Armed(whole.epoch)));
        }
        actions.extend(self.try_ack());
        Ok(actions)
    }

    /// Asks whether the newest whole epoch can be acknowledged, unless the receiver is too far behind.
    fn try_ack(&mut self) -> Actions {
        let Some(epoch) = self.staging.whole() else { return Vec::new() };
        if self.acked == Some(epoch) || self.checking == Some(epoch) {
            return Vec::new();
        }
        let older = self.backlog.iter().filter(|(e, _)| *e < epoch);
        let (count, bytes) = older.fold((0, 0), |(n, sum), (_, bytes)| (n + 1, sum + bytes));
        if count > self.policy.backlog_epochs || bytes > self.policy.backlog_bytes {
            return Vec::new();
        }
        self.checking = Some(epoch);
        vec![Action::CheckAlive(epoch)]
    }

    fn drained(&mut self, epoch: Epoch) -> Actions {
        while self.backlog.front().is_some_and(|(first, _)| *first <= epoch) {
            self.backlog.pop_front();
        }
        match self.state {
            State::Syncing | State::Armed => self.try_ack(),
            State::Waiting
            | State::Activating
            | State::Claiming
            | State::Starting
            | State::Active
            | State::Discarding
            | State::Discarded => Vec::new(),
        }
    }

    fn alive(&mut self, epoch: Epoch) -> Actions {
        let open = matches!(self.state, State::Syncing | State::Armed);
        if !open || self.checking != Some(epoch) {
            return Vec::new();
        }
        self.checking = None;
        self.acked = Some(epoch);
        let (backlog_epochs, backlog_bytes) = self.backlog();
        let mut actions = vec![Action::Send(Frame::Ack { epoch, backlog_epochs, backlog_bytes })];
        actions.extend(self.try_ack());
        actions
    }

    /// Ends the session because epochs cannot be taken any more. An armed copy stays for an operator: if the primary dies
    /// before it reads this, the copy is all there is.
    fn give_up(&mut self, error: &StageError) -> Actions {
        let text = error.to_string();
        self.staging.discard_open();
        let (reason, code) = match error {
            StageError::Order(_) => (LostReason::Protocol, Some(ErrorCode::Unexpected)),
            StageError::Mismatch { .. } => (LostReason::Digest, None),
            StageError::TooLarge { .. } => (LostReason::Memory, None),
        };
        let mut actions = vec![Action::Send(Frame::BackupLost { reason, text: text.clone() })];
        actions.extend(code.map(|code| Action::Send(Frame::Error { code, text: text.clone() })));
        actions.push(Action::CloseLink);
        if self.state == State::Armed {
            self.gave_up = true;
            self.state = State::Waiting;
            actions.push(Action::Report(Report::Waiting(format!(
                "{text}. The primary was told and goes on unprotected. The copy of the last good epoch is kept until the primary \
                 connects again or `remus failover` or `remus discard` decides"
            ))));
            return actions;
        }
        actions.extend(self.discard(text));
        actions
    }

    fn discard(&mut self, why: String) -> Actions {
        self.state = State::Discarding;
        self.staging.discard_open();
        self.why = why;
        vec![Action::DestroyCopy]
    }

    fn destroyed(&mut self) -> Actions {
        if self.state != State::Discarding {
            return Vec::new();
        }
        self.state = State::Discarded;
        let mut actions = Vec::new();
        if self.stop.is_some() {
            actions.push(Action::Send(Frame::Stopped));
        }
        actions.push(Action::CloseLink);
        actions.push(Action::Report(Report::Discarded(self.why.clone())));
        actions
    }

    fn receiver_died(&mut self, text: String) -> Actions {
        match self.state {
            State::Syncing | State::Armed => {
                let lost = Frame::BackupLost { reason: LostReason::Receiver, text: text.clone() };
                let mut actions = vec![Action::Send(lost)];
                actions.extend(self.discard(text));
                actions
            }
            State::Waiting => self.discard(text),
            State::Activating | State::Claiming | State::Starting => {
                let mut actions = vec![Action::Report(Report::ActivationFailed(text.clone()))];
                // A claim that cannot be used goes back, so that the primary's copy may live (DESIGN section 3).
                if self.policy.witness && self.state != State::Activating {
                    actions.push(Action::Forfeit);
                }
                actions.extend(self.discard(text));
                actions
            }
            // The receiver ends when it has done its work.
            State::Active | State::Discarding | State::Discarded => Vec::new(),
        }
    }

    fn primary_suspect(&mut self) -> Actions {
        self.suspect = true;
        match self.state {
            State::Syncing => {
                let text = "nothing is heard from the primary; the copy is not complete yet and cannot be activated";
                vec![Action::Report(Report::Suspect(text.into()))]
            }
            State::Armed | State::Waiting if self.policy.witness && !self.gave_up => self.activate(Authority::Witness),
            State::Armed | State::Waiting if self.activates_by_policy() => self.activate(Authority::Policy),
            State::Armed | State::Waiting => {
                let text =
                    "nothing is heard from the primary; if its host is off, run `remus failover --primary-is-off`";
                vec![Action::Report(Report::Suspect(text.into()))]
            }
            State::Activating
            | State::Claiming
            | State::Starting
            | State::Active
            | State::Discarding
            | State::Discarded => Vec::new(),
        }
    }

    fn link_closed(&mut self, text: &str) -> Actions {
        match self.state {
            // No session is ever resumed, so an incomplete copy is of no use to anybody.
            State::Syncing => self.discard(format!("the link ended before the first copy was complete: {text}")),
            State::Armed => {
                self.staging.discard_open();
                self.state = State::Waiting;
                vec![Action::Report(Report::Waiting(format!(
                    "the link to the primary has ended ({text}); the copy is kept. If the primary's host is off, run \
                     `remus failover --primary-is-off`; `remus discard` destroys the copy"
                )))]
            }
            State::Waiting
            | State::Activating
            | State::Claiming
            | State::Starting
            | State::Active
            | State::Discarding
            | State::Discarded => Vec::new(),
        }
    }

    fn operator_failover(&mut self, primary_is_off: bool) -> Actions {
        let refuse = |text: &str| vec![Action::Refuse(text.into())];
        match self.state {
            State::Syncing => {
                refuse("the copy is not complete yet: no armed epoch has arrived, it cannot be activated")
            }
            State::Armed if !self.suspect => refuse(
                "the primary is alive and the guest is protected; power the primary off first, or stop the protection there",
            ),
            State::Armed | State::Waiting if self.policy.witness => self.activate(Authority::Witness),
            State::Armed | State::Waiting if !primary_is_off => refuse(
                "without a witness nobody but you can know whether the guest still runs on the primary; make sure that host \
                 is off and say so with --primary-is-off",
            ),
            State::Armed | State::Waiting => self.activate(Authority::Operator),
            State::Activating | State::Claiming | State::Starting => refuse("the copy is being activated already"),
            State::Active => refuse("the copy runs already"),
            State::Discarding | State::Discarded => {
                vec![Action::Refuse(format!("there is no copy any more: {}", self.why))]
            }
        }
    }

    fn activate(&mut self, authority: Authority) -> Actions {
        // R4. The states that lead here imply it; an epoch that is not armed must not slip through a later change.
        let Some(epoch) = self.staging.armed() else {
            return vec![Action::Refuse("no armed epoch has arrived".into())];
        };
        self.staging.discard_open();
        self.checking = None;
        self.authority = authority;
        self.state = State::Activating;
        let state = self.staging.state().to_vec();
        vec![Action::Report(Report::Activating(epoch, authority)), Action::FinishCopy { epoch, state }]
    }

    fn copy_ready(&mut self) -> Actions {
        if self.state != State::Activating {
            return Vec::new();
        }
        if self.authority == Authority::Witness {
            self.state = State::Claiming;
            return vec![Action::Claim];
        }
        self.state = State::Starting;
        vec![Action::Go]
    }

    fn claim_won(&mut self) -> Actions {
        if self.state != State::Claiming {
            return Vec::new();
        }
        self.state = State::Starting;
        vec![Action::Go]
    }

    fn claim_lost(&mut self, text: &str) -> Actions {
        if self.state != State::Claiming {
            return Vec::new();
        }
        let text = format!("the witness says that the guest runs elsewhere: {text}");
        let mut actions = vec![Action::Report(Report::ActivationFailed(text.clone()))];
        actions.extend(self.discard(text));
        actions
    }

    fn copy_runs(&mut self) -> Actions {
        if self.state != State::Starting {
            return Vec::new();
        }
        self.state = State::Active;
        let mut actions = vec![Action::Send(self.superseded())];
        actions.extend(self.staging.armed().map(|epoch| Action::Report(Report::Active(epoch))));
        actions
    }

    fn operator_discard(&mut self) -> Actions {
        let refuse = |text: &str| vec![Action::Refuse(text.into())];
        match self.state {
            State::Syncing | State::Armed | State::Waiting | State::Activating => {
                self.end_unless_started("an operator discarded the copy", Some(LostReason::Discarded))
            }
            State::Claiming => refuse("the witness has been asked for the protection; wait for its answer"),
            State::Starting => refuse("the copy is being started"),
            State::Active => refuse("the copy was activated and is an ordinary domain now; use `xl destroy`"),
            State::Discarding | State::Discarded => refuse("there is no copy any more"),
        }
    }

    fn end_unless_started(&mut self, why: &str, tell: Option<LostReason>) -> Actions {
        match self.state {
            State::Syncing | State::Armed | State::Waiting | State::Activating => {
                let mut actions = Vec::new();
                if self.state == State::Activating {
                    actions.push(Action::Report(Report::ActivationFailed(why.into())));
                }
                actions.extend(tell.map(|reason| Action::Send(Frame::BackupLost { reason, text: why.into() })));
                actions.extend(self.discard(why.into()));
                actions
            }
            // A claim is under way or won: only its outcome decides.
            State::Claiming | State::Starting | State::Active | State::Discarding | State::Discarded => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
