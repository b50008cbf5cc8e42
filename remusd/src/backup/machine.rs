//! Decides, for one incoming protection, what is acknowledged, fed, activated and destroyed. Sans-IO.
//!
//! The rules of DESIGN section 3 that live here: R2 (whole epochs, acknowledging stops before activation begins), R4 (nothing
//! before the first armed epoch), R7 (nothing unverified is acknowledged or applied after arming), R9 (no end of a link or process activates).

use std::collections::VecDeque;

use bytes::Bytes;

pub use self::terms::{Action, Authority, Event, Policy, Report, State};
use super::staging::{StageError, Staging};
use crate::enforced::enforced;
use crate::ids::Epoch;
use crate::link::{EpochEnd, ErrorCode, Frame, LostReason, OnPrimaryLoss, RecordKey, StopReason, Token};
use crate::stream::Record;

mod activation;
mod terms;
mod token;

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
    token: Token,
    /// A proposed mode that is being written to disk.
    proposed: Option<(u64, Token)>,
    /// The further interval after a suspicion runs.
    grace: bool,
    /// An operator wants the witness asked, whether the primary is heard or not.
    asked: bool,
    claim: Claim,
    /// The built copy was not claimed for, since the primary was heard again.
    unclaimed: bool,
    /// The primary handed the guest over and waits for our word.
    handed: bool,
    /// The copy runs without the witness's word.
    unrecorded: bool,
    stop: Option<StopReason>,
    why: String,
}

/// What is known of our claim: one that was won is given up if the copy cannot run (hazard F6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// None was sent, or it was lost.
    No,
    /// It was sent; it may be won at any moment.
    Sent,
    /// It was won.
    Won(RecordKey),
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
            token: Token::Primary,
            proposed: None,
            grace: false,
            asked: false,
            claim: Claim::No,
            unclaimed: false,
            handed: false,
            unrecorded: false,
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

    /// The newest whole epoch and its state, if the receiver has been given exactly that: not while pages of a later one go straight to it,
    /// and not once an activation has begun.
    #[must_use]
    pub fn restorable(&self) -> Option<(Epoch, &[Record])> {
        let still = matches!(self.state, State::Armed | State::Waiting) && !self.staging.passes_through();
        self.staging.whole().filter(|_| still).map(|epoch| (epoch, self.staging.state()))
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
        let may = matches!(self.state, State::Armed | State::Waiting) && !self.gave_up;
        may && self.token == Token::Primary && self.policy.on_primary_loss == OnPrimaryLoss::Activate
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
            Event::ClaimWon(key) => self.claim_won(key),
            Event::ClaimLost(text) => self.claim_lost(&text),
            Event::ClaimUnknown => match self.state {
                State::Claiming => vec![Action::Report(Report::WitnessSilent)],
                _ => Vec::new(),
            },
            Event::ClaimRefused(text) => self.claim_refused(text),
            Event::StillMine => self.still_mine(),
            Event::RecordActive(text) => self.record_active(text),
            Event::RecordForfeited => self.record_forfeited(),
            Event::Forfeited => self.forfeited(),
            Event::GraceOver => self.grace_over(),
            Event::LanUp => self.lan(None),
            Event::LanDown(text) => self.lan(Some(text)),
            Event::TokenSaved { seq } => self.token_saved(seq),
            Event::TokenUnsaved(text) => self.token_unsaved(text),
            Event::HandoverImpossible(text) => self.handover_impossible(text),
            Event::AssumeAlone => self.assume_alone(),
            // An activation that was faster goes on.
            Event::Replaced if self.state == State::Activating => Vec::new(),
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
            (_, Frame::Heartbeat(_) | Frame::Audit(_)) if self.state != State::Active => Vec::new(),
            // To a challenge that nobody waits for any more.
            (_, Frame::ChallengeAnswer { .. }) => Vec::new(),
            (
                // A claim, whatever becomes of it, is given up once the copy is gone.
                State::Syncing
                | State::Armed
                | State::Waiting
                | State::Activating
                | State::Claiming
                | State::Confirming
                | State::Yielding,
                Frame::Stop { reason },
            ) => {
                self.stop = Some(reason);
                let failed = matches!(self.state, State::Activating | State::Claiming | State::Confirming)
                    .then(|| Report::ActivationFailed("the primary is alive and has stopped the protection".into()));
                let mut actions: Actions = failed.into_iter().map(Action::Report).collect();
                actions.extend(self.discard(format!("the primary ended the protection ({reason:?})")));
                actions
            }
            (State::Syncing | State::Armed, Frame::Token { seq, token }) => self.token_proposed(seq, token),
            (State::Syncing | State::Armed, Frame::Handover { epoch, token }) => self.handover(epoch, token),
            (State::Syncing | State::Armed, frame) => self.data(frame),

            // The session is over; what was still on its way belongs to nothing (R2).
            (State::Waiting, _) => Vec::new(),
            // Acknowledging has stopped for good; the answer comes when it is known who runs (hazard F9).
            (State::Activating | State::Claiming | State::Confirming | State::Starting | State::Yielding, _) => {
                Vec::new()
            }
            (State::Active, _) => vec![Action::Send(self.superseded())],
            (State::Discarding | State::Forfeiting, Frame::Stop { reason }) => {
                self.stop = Some(reason);
                Vec::new()
            }
            (State::Discarding | State::Forfeiting, _) => Vec::new(),
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
            | Frame::Challenge { .. }
            | Frame::ChallengeAnswer { .. }
            | Frame::Ack { .. }
            | Frame::Heartbeat(_)
            | Frame::Stop { .. }
            | Frame::Stopped
            | Frame::BackupLost { .. }
            | Frame::Superseded { .. }
            | Frame::Handover { .. }
            | Frame::HandoverFailed { .. }
            | Frame::Token { .. }
            | Frame::TokenAck { .. }
            | Frame::Audit(_)
            | Frame::CodedPages { .. }
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
        if enforced("R8-backlog") && (count > self.policy.backlog_epochs || bytes > self.policy.backlog_bytes) {
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
            _ => Vec::new(),
        }
    }

    fn alive(&mut self, epoch: Epoch) -> Actions {
        let open = matches!(self.state, State::Syncing | State::Armed) || !enforced("R2-claiming-freezes-acks");
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
        // A claim that cannot be used goes back, so that the primary's copy may live: only now that this one is surely gone.
        match self.claim {
            Claim::No => self.discarded(),
            Claim::Sent => {
                self.state = State::Forfeiting;
                Vec::new()
            }
            Claim::Won(_) if !enforced("R6-winner-that-fails-forfeits") => self.discarded(),
            Claim::Won(key) => {
                self.state = State::Forfeiting;
                vec![Action::Forfeit(key)]
            }
        }
    }

    fn forfeited(&mut self) -> Actions {
        if self.state == State::Forfeiting { self.discarded() } else { Vec::new() }
    }

    fn discarded(&mut self) -> Actions {
        self.state = State::Discarded;
        let mut actions = Vec::new();
        if self.handed {
            actions.push(Action::Send(Frame::HandoverFailed { text: self.why.clone() }));
        }
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
            State::Waiting | State::Yielding => self.discard(text),
            State::Activating | State::Claiming | State::Confirming | State::Starting => {
                let mut actions = vec![Action::Report(Report::ActivationFailed(text.clone()))];
                actions.extend(self.discard(text));
                actions
            }
            // The receiver ends when it has done its work.
            State::Active | State::Discarding | State::Forfeiting | State::Discarded => Vec::new(),
        }
    }

    fn link_closed(&mut self, text: &str) -> Actions {
        match self.state {
            // No session is ever resumed, so an incomplete copy is of no use to anybody.
            State::Syncing => self.discard(format!("the link ended before the first copy was complete: {text}")),
            State::Armed if !enforced("R9-an-ended-link-activates-nothing") => self.activate(Authority::Operator),
            State::Armed => {
                self.staging.discard_open();
                self.state = State::Waiting;
                if self.token != Token::Primary {
                    return vec![Action::Report(Report::Waiting(format!(
                        "the link to the primary has ended ({text}); the copy is kept. If nothing is heard from it the witness is asked"
                    )))];
                }
                vec![Action::Report(Report::Waiting(format!(
                    "the link to the primary has ended ({text}); the copy is kept. If the primary's host is off, run \
                     `remus failover --primary-is-off`; `remus discard` destroys the copy"
                )))]
            }
            _ => Vec::new(),
        }
    }

    fn end_unless_started(&mut self, why: &str, tell: Option<LostReason>) -> Actions {
        match self.state {
            State::Syncing | State::Armed | State::Waiting | State::Activating | State::Yielding => {
                let mut actions = Vec::new();
                if self.state == State::Activating {
                    actions.push(Action::Report(Report::ActivationFailed(why.into())));
                }
                actions.extend(tell.map(|reason| Action::Send(Frame::BackupLost { reason, text: why.into() })));
                actions.extend(self.discard(why.into()));
                actions
            }
            // The daemon ends and the copy with it: the claim, whatever becomes of it, is given up after that.
            State::Claiming | State::Confirming if tell == Some(LostReason::Shutdown) => {
                let mut actions = vec![Action::Report(Report::ActivationFailed(why.into()))];
                actions.extend(self.discard(why.into()));
                actions
            }
            // A claim is under way or won: only its outcome decides.
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
