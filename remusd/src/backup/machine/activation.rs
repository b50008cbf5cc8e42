//! What leads to an activation, or ends one.

use super::{Action, Actions, Authority, Machine, Report, State};
use crate::link::LostReason;

impl Machine {
    pub(super) fn primary_suspect(&mut self) -> Actions {
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

    pub(super) fn operator_failover(&mut self, primary_is_off: bool) -> Actions {
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

    pub(super) fn activate(&mut self, authority: Authority) -> Actions {
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

    pub(super) fn copy_ready(&mut self) -> Actions {
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

    pub(super) fn claim_won(&mut self) -> Actions {
        if self.state != State::Claiming {
            return Vec::new();
        }
        self.state = State::Starting;
        vec![Action::Go]
    }

    pub(super) fn claim_lost(&mut self, text: &str) -> Actions {
        if self.state != State::Claiming {
            return Vec::new();
        }
        let text = format!("the witness says that the guest runs elsewhere: {text}");
        let mut actions = vec![Action::Report(Report::ActivationFailed(text.clone()))];
        actions.extend(self.discard(text));
        actions
    }

    pub(super) fn copy_runs(&mut self) -> Actions {
        if self.state != State::Starting {
            return Vec::new();
        }
        self.state = State::Active;
        let mut actions = vec![Action::Send(self.superseded())];
        actions.extend(self.staging.armed().map(|epoch| Action::Report(Report::Active(epoch))));
        actions
    }

    pub(super) fn operator_discard(&mut self) -> Actions {
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
}
