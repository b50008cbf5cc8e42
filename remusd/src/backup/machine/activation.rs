//! What leads to an activation, or ends one.

use super::{Action, Actions, Authority, Claim, Machine, Report, State};
use crate::enforced::enforced;
use crate::ids::Epoch;
use crate::link::{Frame, LostReason, RecordKey, Token};

impl Machine {
    /// Whether the witness decides about this copy without an operator.
    fn may_claim(&self) -> bool {
        self.token != Token::Primary && !self.gave_up
    }

    pub(super) fn primary_suspect(&mut self) -> Actions {
        self.suspect = true;
        let suspect = |text: &str| vec![Action::Report(Report::Suspect(text.into()))];
        match self.state {
            State::Syncing => {
                suspect("nothing is heard from the primary; the copy is not complete yet and cannot be activated")
            }
            // A stalled host of our own, or a short cut, costs nothing yet (hazard F22).
            State::Armed | State::Waiting if self.may_claim() => {
                let mut actions = suspect("nothing is heard from the primary; if that stays so the witness is asked");
                if !std::mem::replace(&mut self.grace, true) {
                    actions.push(Action::StartGrace);
                }
                actions
            }
            State::Yielding if std::mem::take(&mut self.unclaimed) => match self.token {
                Token::Witness(key) => {
                    self.state = State::Claiming;
                    self.claim = Claim::Sent;
                    vec![Action::Claim(key)]
                }
                Token::Primary => Vec::new(),
            },
            State::Armed | State::Waiting if self.activates_by_policy() => self.activate(Authority::Policy),
            State::Armed | State::Waiting => {
                suspect("nothing is heard from the primary; if its host is off, run `remus failover --primary-is-off`")
            }
            _ => Vec::new(),
        }
    }

    fn still_lost(&self) -> bool {
        matches!(self.state, State::Armed | State::Waiting) && self.suspect && self.may_claim()
    }

    pub(super) fn grace_over(&mut self) -> Actions {
        self.grace = false;
        if self.still_lost() { vec![Action::CheckLan] } else { Vec::new() }
    }

    pub(super) fn lan(&mut self, down: Option<String>) -> Actions {
        match down {
            _ if !self.still_lost() => Vec::new(),
            None => self.activate(Authority::Witness),
            // A copy that nobody can reach must not win against a primary that serves (hazard F22).
            Some(text) => {
                let mut actions = vec![Action::Report(Report::Abstaining(text))];
                if !std::mem::replace(&mut self.grace, true) {
                    actions.push(Action::StartGrace);
                }
                actions
            }
        }
    }

    pub(super) fn operator_failover(&mut self, primary_is_off: bool) -> Actions {
        let refuse = |text: &str| vec![Action::Refuse(text.into())];
        match self.state {
            State::Syncing => {
                refuse("the copy is not complete yet: no armed epoch has arrived, it cannot be activated")
            }
            State::Armed if !self.suspect => refuse(
                "the primary is alive and the guest is protected; power the primary off first, or stop the protection there",
            ),
            State::Armed | State::Waiting if self.token != Token::Primary && !primary_is_off => {
                self.asked = true;
                self.activate(Authority::Witness)
            }
            State::Armed | State::Waiting if !primary_is_off => refuse(
                "no witness decides about this copy, so nobody but you can know whether the guest still runs on the primary; make \
                 sure that host is off and say so with --primary-is-off",
            ),
            State::Armed | State::Waiting => self.activate(Authority::Operator),
            State::Yielding if !primary_is_off => refuse(
                "the witness says that the guest runs elsewhere; if that host is surely off, say so with --primary-is-off",
            ),
            State::Yielding => match self.token {
                Token::Witness(key) => {
                    self.state = State::Claiming;
                    self.claim = Claim::Sent;
                    vec![Action::Force(key)]
                }
                Token::Primary => Vec::new(),
            },
            State::Activating | State::Claiming | State::Confirming | State::Starting => {
                refuse("the copy is being activated already")
            }
            State::Active => refuse("the copy runs already"),
            State::Discarding | State::Forfeiting | State::Discarded => {
                vec![Action::Refuse(format!("there is no copy any more: {}", self.why))]
            }
        }
    }

    /// The primary's guest stands still after `epoch` and is ours to run.
    pub(super) fn handover(&mut self, epoch: Epoch, token: Token) -> Actions {
        self.handed = true;
        let whole = self.staging.armed() == Some(epoch) && self.acked == Some(epoch);
        if self.state != State::Armed || !whole {
            return self
                .discard(format!("the primary handed the guest over after epoch {epoch}, which is not here whole"));
        }
        // Two minds about who decides would be two owners.
        if token != self.token || self.proposed.is_some() {
            let ours = self.token;
            return self.discard(format!("the primary takes the token to be {token}, this host {ours}"));
        }
        self.activate(Authority::Handover)
    }

    pub(super) fn handover_impossible(&mut self, text: String) -> Actions {
        if self.state != State::Armed {
            return Vec::new();
        }
        self.handed = true;
        self.discard(text)
    }

    pub(super) fn activate(&mut self, authority: Authority) -> Actions {
        // R4. The states that lead here imply it; an epoch that is not armed must not slip through a later change.
        let Some(epoch) = self.staging.armed() else {
            return vec![Action::Refuse("no armed epoch has arrived".into())];
        };
        self.staging.discard_open();
        if enforced("R2-claiming-freezes-acks") {
            self.checking = None;
        }
        self.authority = authority;
        self.state = State::Activating;
        let state = self.staging.state().to_vec();
        vec![Action::Report(Report::Activating(epoch, authority)), Action::FinishCopy { epoch, state }]
    }

    /// Everything that can fail has not: now ownership.
    pub(super) fn copy_ready(&mut self) -> Actions {
        if self.state != State::Activating {
            return Vec::new();
        }
        if self.authority == Authority::Witness && !self.suspect && !self.asked {
            let text = "the primary was heard again while the copy was being built; a copy that is built takes no further epoch";
            let lost = Frame::BackupLost { reason: LostReason::Claimed, text: text.into() };
            let mut actions = vec![Action::Report(Report::ActivationFailed(text.into())), Action::Send(lost)];
            // What was heard may have been on its way since before the primary died (hazard F6): the copy goes when the record says
            // that the primary goes on, and is claimed for when nothing more is heard.
            self.state = State::Yielding;
            self.why = text.into();
            self.unclaimed = true;
            actions.extend(self.token.record().map(Action::WatchRecord));
            return actions;
        }
        match (self.token, self.authority) {
            (Token::Witness(key), Authority::Operator) => {
                self.state = State::Claiming;
                self.claim = Claim::Sent;
                vec![Action::Force(key)]
            }
            (Token::Witness(key), _) if enforced("R3-claim-before-go") => {
                self.state = State::Claiming;
                self.claim = Claim::Sent;
                vec![Action::Claim(key)]
            }
            _ => self.go(),
        }
    }

    fn go(&mut self) -> Actions {
        self.state = State::Starting;
        vec![Action::Go]
    }

    pub(super) fn claim_won(&mut self, key: RecordKey) -> Actions {
        match self.state {
            State::Claiming => {
                self.claim = Claim::Won(key);
                self.token = Token::Witness(key);
                self.state = State::Confirming;
                vec![Action::ConfirmClaim(key)]
            }
            State::Discarding => {
                self.claim = Claim::Won(key);
                Vec::new()
            }
            State::Forfeiting if self.claim == Claim::Sent => {
                self.claim = Claim::Won(key);
                vec![Action::Forfeit(key)]
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn still_mine(&mut self) -> Actions {
        if self.state == State::Confirming { self.go() } else { Vec::new() }
    }

    pub(super) fn claim_lost(&mut self, text: &str) -> Actions {
        if let Some(actions) = self.no_claim() {
            return actions;
        }
        let text = format!("the witness says that the guest runs elsewhere: {text}");
        // The winner may yet fail to go on; then this copy is the only one (hazard F6).
        self.state = State::Yielding;
        self.why.clone_from(&text);
        let mut actions = vec![Action::Report(Report::ActivationFailed(text))];
        actions.extend(self.token.record().map(Action::WatchRecord));
        actions
    }

    /// Nothing can be concluded from the record; the built copy is kept for an operator.
    pub(super) fn claim_refused(&mut self, text: String) -> Actions {
        if let Some(actions) = self.no_claim() {
            return actions;
        }
        self.state = State::Yielding;
        self.why.clone_from(&text);
        vec![Action::Report(Report::ActivationFailed(text))]
    }

    /// The claim was not won. What follows, unless the copy waits for it.
    fn no_claim(&mut self) -> Option<Actions> {
        match self.state {
            State::Claiming | State::Confirming => {
                self.claim = Claim::No;
                None
            }
            State::Discarding => {
                self.claim = Claim::No;
                Some(Vec::new())
            }
            State::Forfeiting if self.claim == Claim::Sent => Some(self.discarded()),
            _ => Some(Vec::new()),
        }
    }

    pub(super) fn record_active(&mut self, text: String) -> Actions {
        if self.state == State::Yielding { self.discard(text) } else { Vec::new() }
    }

    pub(super) fn record_forfeited(&mut self) -> Actions {
        match (self.state, self.token) {
            (State::Yielding, Token::Witness(key)) => {
                self.state = State::Claiming;
                self.claim = Claim::Sent;
                vec![Action::Claim(key)]
            }
            _ => Vec::new(),
        }
    }

    /// Primary and witness are both lost, and an operator knows that the guest runs nowhere.
    pub(super) fn assume_alone(&mut self) -> Actions {
        match self.state {
            State::Claiming | State::Confirming => {
                self.unrecorded = true;
                self.go()
            }
            _ => vec![Action::Refuse(
                "the copy does not wait for the witness; `remus failover` activates one that has lost its primary"
                    .into(),
            )],
        }
    }

    pub(super) fn copy_runs(&mut self) -> Actions {
        if self.state != State::Starting {
            return Vec::new();
        }
        self.state = State::Active;
        let mut actions = vec![Action::Send(self.superseded())];
        match self.token {
            Token::Witness(key) if !self.unrecorded => actions.push(Action::Activate(key)),
            // So that a primary that comes back learns of it from the witness too.
            _ if self.policy.witness => actions.push(Action::ForceActive),
            _ => {}
        }
        actions.extend(self.staging.armed().map(|epoch| Action::Report(Report::Active(epoch))));
        actions
    }

    pub(super) fn operator_discard(&mut self) -> Actions {
        let refuse = |text: &str| vec![Action::Refuse(text.into())];
        match self.state {
            State::Syncing | State::Armed | State::Waiting | State::Activating | State::Yielding => {
                self.end_unless_started("an operator discarded the copy", Some(LostReason::Discarded))
            }
            State::Claiming | State::Confirming => {
                refuse("the witness has been asked for the protection; wait for its answer")
            }
            State::Starting => refuse("the copy is being started"),
            State::Active => refuse("the copy was activated and is an ordinary domain now; use `xl destroy`"),
            State::Discarding | State::Forfeiting | State::Discarded => refuse("there is no copy any more"),
        }
    }
}
