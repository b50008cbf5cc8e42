//! Switchover: the guest stands still after its last epoch here, which is acknowledged and released, and goes on there.
//!
//! Until the hand-over is recorded nothing is given away and everything goes back. From then on this copy stays still until the backup's
//! runs, or is gone and the record is ours again, or an operator decides (R3, R6; hazard F5).

use super::{Action, Actions, Event, Handover, Machine, State, StopWhy};
use crate::enforced::enforced;
use crate::ids::Epoch;
use crate::link::Token;

impl Machine {
    /// A switchover is asked for.
    pub(super) fn ask_handover(&mut self) -> Actions {
        if self.handover != Handover::No {
            return vec![Action::RefuseHandover("a switchover is under way already".into())];
        }
        if !self.is_protected() {
            return self.refuse_handover();
        }
        self.handover = Handover::Requested;
        vec![]
    }

    pub(super) fn refuse_handover(&self) -> Actions {
        vec![Action::RefuseHandover("the guest is not protected, so the backup has no copy that could run".into())]
    }

    /// At an epoch's suspend: whether it is the last one here.
    pub(super) fn leave_if_asked(&mut self, epoch: Epoch) -> Actions {
        if self.handover != Handover::Requested {
            return vec![];
        }
        if !self.armed(epoch) || !self.agreed() {
            self.handover = Handover::No;
            let text = "both sides are just agreeing on whether the witness decides; try again shortly";
            return vec![Action::RefuseHandover(text.into())];
        }
        self.handover = Handover::Leaving;
        vec![]
    }

    /// The last epoch is captured: the guest is not resumed.
    pub(super) fn stay_still(&mut self, epoch: Epoch) -> Actions {
        self.still = true;
        self.state = State::ShippingLast(epoch);
        if !enforced("R1-given-away-stands-still") {
            return vec![Action::EnsureRunning, Action::EngineResumed];
        }
        vec![Action::HoldStill, Action::EngineResumed]
    }

    /// What ends a switchover before anything was given away: the guest runs first (R6).
    fn give_up(&mut self, event: Event) -> Option<Actions> {
        Some(match event {
            Event::BackupLost(text) => self.lost(text, Some(Action::EnsureRunning)),
            Event::EngineFailed(text) | Event::EpochFailed(text) => self.fail_suspended(text),
            Event::AckLate => self.fail_suspended("the backup answers but does not acknowledge the last epoch".into()),
            Event::StopRequested => {
                self.still = false;
                let mut actions = vec![Action::EnsureRunning];
                actions.extend(self.stop(StopWhy::Planned));
                actions
            }
            Event::GuestEnded(end) => {
                self.still = false;
                self.stop(StopWhy::GuestEnded(end))
            }
            Event::HandoverRequested => self.ask_handover(),
            _ => return None,
        })
    }

    pub(super) fn shipping_last(&mut self, epoch: Epoch, event: Event) -> Actions {
        match event {
            Event::EngineWaiting => vec![Action::FinishEpoch { epoch, armed: true }],
            Event::Ack { epoch: acked, .. } if acked == epoch => {
                self.state = State::CommittingLast(epoch);
                vec![Action::Commit(epoch)]
            }
            Event::Ack { epoch: acked, .. } => {
                self.fail_suspended(format!("the backup acknowledged epoch {acked} while {epoch} was sent"))
            }
            event => self.give_up(event).unwrap_or_default(),
        }
    }

    pub(super) fn committing_last(&mut self, epoch: Epoch, event: Event) -> Actions {
        match event {
            Event::Committed => {
                self.state = State::HandingOver(epoch);
                match self.token {
                    Token::Witness(key) => vec![Action::HandRecord(key)],
                    Token::Primary => vec![Action::SaveHandedOver],
                }
            }
            Event::AckLate => vec![],
            event => self.give_up(event).unwrap_or_default(),
        }
    }

    pub(super) fn handing_over(&mut self, epoch: Epoch, event: Event) -> Actions {
        let recorded = match &event {
            Event::RecordHanded => self.token != Token::Primary,
            Event::HandedOverSaved => self.token == Token::Primary,
            _ => false,
        };
        if recorded {
            self.state = State::HandedOver(epoch);
            return vec![Action::SendHandover { epoch, token: self.token }];
        }
        match event {
            Event::RecordLost(text) => self.yield_to(text, StopWhy::Failed("the switchover failed".into())),
            // Whether it says armed or handed over: in both the backup and we may claim, so protection can go on.
            Event::RecordUnknown(text) | Event::HandedOverUnsaved(text) => {
                self.handover = Handover::Aborting;
                self.state = State::Resuming(epoch);
                vec![Action::ReportHandoverFailed(text), Action::Preresume(epoch)]
            }
            Event::BackupLost(text) => match self.token {
                // The hand-over may have been recorded; the claim takes it back and the guest stands still until that is known.
                Token::Witness(key) => {
                    self.handover = Handover::No;
                    self.state = State::Arbitrating(StopWhy::Failed(text));
                    vec![Action::Claim(key)]
                }
                // The backup was told nothing.
                Token::Primary => self.lost(text, Some(Action::EnsureRunning)),
            },
            Event::HandoverRequested => self.ask_handover(),
            _ => vec![],
        }
    }

    pub(super) fn handed_over(&mut self, event: Event) -> Actions {
        let (text, gone) = match event {
            Event::HandoverFailed(text) => (format!("the switchover failed: {text}"), true),
            Event::BackupLost(text) => (text, false),
            Event::HandoverLate => ("the backup does not say what became of the switchover".into(), false),
            Event::HandoverRequested => return self.ask_handover(),
            _ => return vec![],
        };
        self.handover = Handover::No;
        let why = StopWhy::Failed(text.clone());
        let mut actions = vec![Action::ReportHandoverFailed(text.clone())];
        actions.extend(match self.token {
            Token::Witness(key) => {
                self.state = State::Arbitrating(why);
                vec![Action::Claim(key)]
            }
            Token::Primary if gone || !enforced("R3-given-is-given") => self.own(why),
            // The token was in the frame: only the backup or an operator can give it back.
            Token::Primary => {
                self.state = State::Holding(why);
                vec![Action::ReportHolding(text)]
            }
        });
        actions
    }
}
