//! Agreeing with the backup on who decides (hazard F19).
//!
//! Towards the witness: the record is armed, then we are in witness mode, durably, and only then the backup hears of it. Back to the
//! primary's token: the backup gives its claim up durably, and only its acknowledgement ends witness mode here. So the backup may claim
//! only what we know that it may claim.

use super::{Action, Actions, Agreement, Event, Handover, Machine, State, StopWhy};
use crate::enforced::enforced;
use crate::link::Token;

impl Machine {
    /// Whether both sides have the same mode.
    pub(super) fn agreed(&self) -> bool {
        self.agreement == Agreement::Agreed
    }

    /// Brings the mode to where the witness's state wants it, one step.
    pub(super) fn agree(&mut self, why: &str) -> Actions {
        if !self.policy.witness || matches!(self.handover, Handover::Leaving | Handover::Aborting) {
            return vec![];
        }
        match (self.token, self.agreement, self.witness_up) {
            (Token::Primary, Agreement::Agreed, true) if !self.arm_refused => {
                self.arm_id += 1;
                self.agreement = Agreement::Arming { id: self.arm_id };
                vec![Action::ArmRecord { id: self.arm_id }]
            }
            // What the arming under way brings does not count any more; the record stays ours.
            (Token::Primary, Agreement::Arming { .. }, false) => {
                self.agreement = Agreement::Agreed;
                vec![Action::ReportToken(Token::Primary, why.into())]
            }
            (Token::Witness(_), Agreement::Agreed | Agreement::Asked { token: Token::Witness(_), .. }, false) => {
                if !enforced("R3-token-needs-its-answer") {
                    self.token = Token::Primary;
                }
                self.ask(Token::Primary)
            }
            _ => vec![],
        }
    }

    fn ask(&mut self, token: Token) -> Actions {
        self.token_seq += 1;
        let seq = self.token_seq;
        self.agreement = Agreement::Asked { seq, token };
        vec![Action::SendToken { seq, token }]
    }

    pub(super) fn on_token(&mut self, event: Event) -> Actions {
        match (event, self.agreement) {
            (Event::WitnessUp, _) => self.agree("the witness answers again"),
            (Event::WitnessDown(text), _) => self.agree(&text),
            (Event::RecordArmed { id, key }, Agreement::Arming { id: ours }) if id == ours => {
                // In memory at once: from here on a claim is needed.
                self.token = Token::Witness(key);
                self.agreement = Agreement::Saving(self.token);
                vec![Action::SaveToken(self.token)]
            }
            (Event::ArmRefused { id, text }, Agreement::Arming { id: ours }) if id == ours => {
                self.agreement = Agreement::Agreed;
                self.arm_refused = true;
                if self.armed_from.is_none() {
                    return self.fail_running(text);
                }
                vec![Action::ReportToken(Token::Primary, text)]
            }
            (Event::TokenSaved, Agreement::Saving(token @ Token::Witness(_))) => {
                let mut actions = self.ask(token);
                // The witness may have gone meanwhile.
                actions.extend(self.agree("the witness does not answer any more"));
                actions
            }
            // Not durable, and the backup has not heard of it.
            (Event::TokenUnsaved(text), Agreement::Saving(Token::Witness(_))) => {
                self.token = Token::Primary;
                self.agreement = Agreement::Agreed;
                self.arm_refused = true;
                vec![Action::ReportToken(Token::Primary, text)]
            }
            (Event::TokenAck { seq }, Agreement::Asked { seq: ours, token }) if seq == ours => match token {
                Token::Witness(_) => {
                    self.agreement = Agreement::Agreed;
                    let mut actions = vec![Action::ReportToken(token, "armed".into())];
                    actions.extend(self.agree("the witness does not answer any more"));
                    actions
                }
                Token::Primary => {
                    self.agreement = Agreement::Saving(Token::Primary);
                    vec![Action::SaveToken(Token::Primary)]
                }
            },
            (Event::TokenSaved, Agreement::Saving(Token::Primary)) => {
                self.token = Token::Primary;
                self.agreement = Agreement::Agreed;
                let mut actions = vec![Action::ReportToken(Token::Primary, "the witness does not answer".into())];
                actions.extend(self.agree("the witness does not answer"));
                actions
            }
            // The stricter mode stays; the backup claims nothing, so a later arming is still in order.
            (Event::TokenUnsaved(text), Agreement::Saving(Token::Primary)) => {
                vec![Action::ReportToken(self.token, text)]
            }
            _ => vec![],
        }
    }

    /// Protection cannot begin; the guest may stand still for an epoch.
    fn fail_running(&mut self, text: String) -> Actions {
        if matches!(self.state, State::Suspending(_) | State::Capturing(_) | State::Resuming(_)) {
            return self.fail_suspended(text);
        }
        self.stop(StopWhy::Failed(text))
    }
}
