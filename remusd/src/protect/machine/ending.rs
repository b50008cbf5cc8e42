//! Who owns the guest at the end of a protection (R3, R6, R9; hazards F5, F6, F8, F19, F24).

use super::{
    Action, Actions, DomainFate, Event, Handover, Kept, Machine, OnBackupLoss, Outcome, Output, State, StopWhy,
};
use crate::enforced::enforced;
use crate::link::{RecordKey, Token};

impl Machine {
    /// Ends protection on purpose. With a witness the stop is recorded before the backup hears of it: then its silence does not
    /// matter, and nobody can claim what is over (hazard F24).
    pub(super) fn stop(&mut self, why: StopWhy) -> Actions {
        self.pending_stop = None;
        self.handover = Handover::No;
        match self.token {
            Token::Witness(key) if self.witness_up => {
                self.state = State::Recording(why);
                vec![Action::StopRecord(key)]
            }
            _ => self.send_stop(why),
        }
    }

    fn send_stop(&mut self, why: StopWhy) -> Actions {
        self.state = State::Stopping(why.clone());
        vec![Action::SendStop(why)]
    }

    /// The backup is lost.
    pub(super) fn lost(&mut self, text: String, before: Option<Action>) -> Actions {
        if before.is_some() {
            self.still = false;
        }
        self.handover = Handover::No;
        self.pending_stop = None;
        before.into_iter().chain(self.decide(StopWhy::Failed(text))).collect()
    }

    /// The backup does not answer: the token says whether we may go on.
    fn decide(&mut self, why: StopWhy) -> Actions {
        match self.token {
            Token::Witness(key) if enforced("R3-claim-before-going-on") => {
                self.state = State::Arbitrating(why);
                vec![Action::Claim(key)]
            }
            Token::Primary if self.policy.on_backup_loss == OnBackupLoss::Hold || !enforced("R6-primary-goes-on") => {
                let text = why.sentence();
                self.state = State::Holding(why);
                vec![Action::ReportHolding(text)]
            }
            _ => self.take(why),
        }
    }

    /// The guest is ours although the backup does not say that its copy is gone.
    fn take(&mut self, why: StopWhy) -> Actions {
        // Best effort: a backup that still hears us must not keep a copy that is stale from here on (R4).
        let mut actions = vec![Action::SendStop(why.clone())];
        actions.extend(self.own(why));
        actions
    }

    /// The record is ours.
    fn win(&mut self, key: RecordKey, why: StopWhy) -> Actions {
        self.token = Token::Witness(key);
        let mut actions = vec![Action::Activate(key)];
        actions.extend(self.take(why));
        actions
    }

    /// We own the guest: everything is put back and held output flows.
    pub(super) fn own(&mut self, why: StopWhy) -> Actions {
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
        let mut actions = vec![];
        if std::mem::take(&mut self.still) {
            actions.push(Action::EnsureRunning);
        }
        if std::mem::take(&mut self.frozen) {
            actions.push(Action::Unfreeze);
        }
        let kept = if self.unrecorded { Kept::Keep } else { Kept::Forget };
        actions.push(Action::CleanUp { output: Output::Release, fate, kept });
        actions.extend(report);
        actions
    }

    pub(super) fn superseded(&mut self, text: String) -> Actions {
        let outcome = match self.still {
            true => Outcome::HandedOver(text.clone()),
            false => Outcome::Superseded(text.clone()),
        };
        self.state = State::CleaningUp(outcome);
        let output = if enforced("R3-loser-releases-nothing") { Output::Discard } else { Output::Release };
        let mut actions = vec![Action::SaveSuperseded];
        if !std::mem::replace(&mut self.frozen, true) {
            actions.push(Action::Freeze);
        }
        actions.extend([
            Action::CleanUp { output, fate: DomainFate::Destroy, kept: Kept::Forget },
            Action::ReportSuperseded(text),
        ]);
        actions
    }

    /// The backup has won the record. Its copy may yet fail to start, so this one is kept, frozen and sealed (hazard F6).
    pub(super) fn yield_to(&mut self, text: String, why: StopWhy) -> Actions {
        self.handover = Handover::No;
        self.state = State::Yielding(why);
        let mut actions = vec![];
        if !std::mem::replace(&mut self.frozen, true) {
            actions.push(Action::Freeze);
        }
        actions.extend(self.token.record().map(Action::WatchRecord));
        actions.push(Action::ReportYielding(text));
        actions
    }

    pub(super) fn cleaned_up(&mut self, outcome: Outcome) -> Actions {
        if self.unrecorded
            && let Token::Witness(key) = self.token
        {
            self.state = State::Unrecorded(outcome);
            return vec![Action::Claim(key)];
        }
        self.state = State::Ended(outcome.clone());
        vec![Action::End(outcome)]
    }

    pub(super) fn recording(&mut self, why: StopWhy, event: Event) -> Actions {
        match event {
            Event::RecordStopped => {
                self.stop_recorded = true;
                if self.link_lost { self.own(why) } else { self.send_stop(why) }
            }
            Event::RecordLost(text) => self.yield_to(text, why),
            Event::RecordUnknown(_) if self.link_lost => self.decide(why),
            // The backup's word that its copy is gone is as good.
            Event::RecordUnknown(_) => self.send_stop(why),
            Event::GuestEnded(end) => {
                self.state = State::Recording(StopWhy::GuestEnded(end));
                vec![]
            }
            Event::HandoverRequested => self.refuse_handover(),
            _ => vec![],
        }
    }

    pub(super) fn stopping(&mut self, why: StopWhy, event: Event) -> Actions {
        match event {
            Event::Stopped => self.own(why),
            Event::StopLate | Event::BackupLost(_) if self.stop_recorded => self.own(why),
            Event::StopLate | Event::BackupLost(_) => self.decide(why),
            Event::RecordStopped => {
                self.stop_recorded = true;
                vec![]
            }
            Event::RecordLost(text) => self.yield_to(text, why),
            Event::GuestEnded(end) => {
                self.state = State::Stopping(StopWhy::GuestEnded(end));
                vec![]
            }
            Event::HandoverRequested => self.refuse_handover(),
            _ => vec![],
        }
    }

    pub(super) fn arbitrating(&mut self, why: StopWhy, event: Event) -> Actions {
        match event {
            Event::ClaimWon(key) => self.win(key, why),
            Event::ClaimLost(_) if !enforced("R3-loser-yields") => self.own(why),
            Event::ClaimLost(text) | Event::RecordLost(text) => self.yield_to(text, why),
            Event::ClaimUnknown if !enforced("R3-unknown-is-not-won") => self.own(why),
            Event::ClaimUnknown => {
                let text = format!("{}, and the witness does not say who owns the guest", why.sentence());
                self.state = State::Holding(why);
                vec![Action::ReportHolding(text)]
            }
            Event::ClaimRefused(text) => {
                self.state = State::Holding(why);
                vec![Action::ReportHolding(text)]
            }
            // The backup holds no copy any more, or the record says stopped: nobody else can own the guest.
            Event::Stopped | Event::RecordStopped => self.own(why),
            Event::GuestEnded(end) => {
                self.state = State::Arbitrating(StopWhy::GuestEnded(end));
                vec![]
            }
            Event::HandoverRequested => self.refuse_handover(),
            _ => vec![],
        }
    }

    pub(super) fn holding(&mut self, why: StopWhy, event: Event) -> Actions {
        match event {
            Event::ClaimWon(key) => self.win(key, why),
            Event::ClaimLost(text) | Event::RecordLost(text) => self.yield_to(text, why),
            Event::WitnessUp => match self.token {
                Token::Witness(key) => {
                    self.state = State::Arbitrating(why);
                    vec![Action::Claim(key)]
                }
                Token::Primary => vec![],
            },
            Event::Stopped | Event::RecordStopped => self.own(why),
            // Nothing is left of the copy that had been handed the guest.
            Event::HandoverFailed(text) if self.token == Token::Primary => self.own(StopWhy::Failed(text)),
            Event::AssumeAlone => {
                self.unrecorded = self.token != Token::Primary;
                self.take(why)
            }
            // The operator says: this copy goes on. That is not enough for one that a witness decides about or that was handed over.
            Event::StopRequested if self.token == Token::Primary && !self.still => self.take(StopWhy::Planned),
            Event::GuestEnded(end) => {
                self.state = State::Holding(StopWhy::GuestEnded(end));
                vec![]
            }
            Event::HandoverRequested => self.refuse_handover(),
            _ => vec![],
        }
    }

    pub(super) fn yielding(&mut self, why: StopWhy, event: Event) -> Actions {
        match (event, self.token) {
            (Event::RecordActive(text), _) => self.superseded(text),
            (Event::RecordForfeited, Token::Witness(key)) => {
                self.state = State::Arbitrating(why);
                vec![Action::ReportForfeited, Action::Claim(key)]
            }
            (Event::ClaimWon(key), _) => self.win(key, why),
            (Event::AssumeAlone, Token::Witness(key)) => {
                self.state = State::Arbitrating(why);
                vec![Action::ForceRecord(key)]
            }
            (Event::GuestEnded(end), _) => {
                self.state = State::Yielding(StopWhy::GuestEnded(end));
                vec![]
            }
            (Event::HandoverRequested, _) => self.refuse_handover(),
            _ => vec![],
        }
    }

    /// The guest runs on an operator's word. Until the record says so too, the backup could still win it (R3, R4).
    pub(super) fn unrecorded(&mut self, outcome: &Outcome, event: Event) -> Actions {
        let end = |machine: &mut Self, mut actions: Actions| {
            machine.state = State::Ended(outcome.clone());
            actions.extend([Action::Forget, Action::End(outcome.clone())]);
            actions
        };
        match (event, self.token) {
            (Event::ClaimWon(key), _) => end(self, vec![Action::Activate(key)]),
            // Two copies may be live, on an operator's word: neither is stopped here, he picks (hazard F5).
            (Event::ClaimLost(text) | Event::ClaimRefused(text), _) => end(self, vec![Action::ReportConflict(text)]),
            (Event::WitnessUp, Token::Witness(key)) => vec![Action::Claim(key)],
            (Event::GuestEnded(end), _) => {
                self.state = State::CleaningUp(Outcome::GuestEnded(end));
                let fate = DomainFate::ByConfig(end);
                vec![Action::CleanUp { output: Output::Release, fate, kept: Kept::Keep }, Action::ReportGuestEnded(end)]
            }
            (Event::HandoverRequested, _) => self.refuse_handover(),
            _ => vec![],
        }
    }
}

impl StopWhy {
    /// Why it is unclear who owns the guest.
    fn sentence(&self) -> String {
        match self {
            Self::Failed(text) => text.clone(),
            Self::Planned => "the backup did not confirm the stop".into(),
            Self::GuestEnded(end) => format!("the guest ended ({end}) and the backup did not confirm"),
        }
    }
}
