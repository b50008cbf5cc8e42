//! Which request a plug qdisc may be sent next. No I/O: the caller sends what it is told and reports back.
//!
//! sch_plug holds exactly one closed epoch. The rule that keeps its counters true is strict alternation:
//! BUFFER for an epoch is never sent before the RELEASE_ONE of the one before it. A RELEASE_ONE that may not
//! have happened ends all alternation, since nothing can be read back from the kernel.

use super::plug_model::PlugOp;

/// Where a plug is between two requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Output does not go through the plug; it is empty and closed.
    Unarmed,
    /// Holding the output of the epoch that is running; nothing is closed.
    Collecting,
    /// BUFFER is on its way.
    Closing {
        /// For this epoch.
        epoch: u64,
    },
    /// Holding the closed output of `epoch` and earlier, and behind it that of the epoch that is running.
    Closed {
        /// The epoch whose acknowledgement lets the closed output go.
        epoch: u64,
    },
    /// Closed, but the epoch was abandoned: the next epoch's acknowledgement covers this output too.
    Abandoned {
        /// The epoch that was given up.
        epoch: u64,
    },
    /// RELEASE_ONE is on its way.
    Releasing {
        /// For this epoch.
        epoch: u64,
    },
    /// RELEASE_INDEFINITE was sent: everything passes.
    Flowing,
    /// It is not known what the plug would do with the next request. It is closed or lets a closed epoch go;
    /// only tearing it down helps.
    Broken {
        /// The epoch whose request failed.
        epoch: u64,
    },
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel has done it.
    Done,
    /// The kernel has refused it and changed nothing.
    Refused,
    /// No answer: done or not.
    Unknown,
}

/// A request that the order of things does not allow. Nothing may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked} for epoch {epoch} is out of turn: the buffer is {phase:?}, last closed epoch {last:?}")]
pub struct OutOfTurn {
    /// What was asked for.
    pub asked: &'static str,
    /// For which epoch.
    pub epoch: u64,
    /// Where the plug is.
    pub phase: Phase,
    /// The last epoch that was closed.
    pub last: Option<u64>,
}

/// The order of requests to one plug qdisc.
#[derive(Debug, Clone)]
pub struct PlugState {
    phase: Phase,
    last: Option<u64>,
}

impl Default for PlugState {
    fn default() -> Self {
        Self { phase: Phase::Unarmed, last: None }
    }
}

impl PlugState {
    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether output goes through the plug.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.phase != Phase::Unarmed
    }

    fn out_of_turn(&self, asked: &'static str, epoch: u64) -> OutOfTurn {
        OutOfTurn { asked, epoch, phase: self.phase, last: self.last }
    }

    /// Output goes through the plug, which is new and empty, from here on.
    ///
    /// # Errors
    /// When it is armed already.
    pub fn arm(&mut self) -> Result<(), OutOfTurn> {
        if self.phase != Phase::Unarmed {
            return Err(self.out_of_turn("arming", 0));
        }
        self.phase = Phase::Collecting;
        Ok(())
    }

    /// The guest is suspended at the end of `epoch`. `Some`: send this, then call [`PlugState::outcome`].
    /// `None`: what is held of an abandoned epoch goes with this one, nothing is to be sent.
    ///
    /// # Errors
    /// When a closed epoch is not released yet, or `epoch` does not lie after the last one.
    pub fn close(&mut self, epoch: u64) -> Result<Option<PlugOp>, OutOfTurn> {
        if self.last.is_some_and(|last| epoch <= last) {
            return Err(self.out_of_turn("BUFFER", epoch));
        }
        match self.phase {
            Phase::Collecting => {
                self.phase = Phase::Closing { epoch };
                Ok(Some(PlugOp::Buffer))
            }
            Phase::Abandoned { .. } => {
                self.last = Some(epoch);
                self.phase = Phase::Closed { epoch };
                Ok(None)
            }
            _ => Err(self.out_of_turn("BUFFER", epoch)),
        }
    }

    /// `epoch` is acknowledged. Send what is returned, then call [`PlugState::outcome`].
    ///
    /// # Errors
    /// When `epoch` is not the closed one.
    pub fn release(&mut self, epoch: u64) -> Result<PlugOp, OutOfTurn> {
        if self.phase != (Phase::Closed { epoch }) {
            return Err(self.out_of_turn("RELEASE_ONE", epoch));
        }
        self.phase = Phase::Releasing { epoch };
        Ok(PlugOp::ReleaseOne)
    }

    /// `epoch` will never be acknowledged. Nothing is to be sent. An epoch whose closing was refused, or that
    /// was never closed, may be abandoned too.
    ///
    /// # Errors
    /// When another epoch is closed, or the plug is broken.
    pub fn abandon(&mut self, epoch: u64) -> Result<(), OutOfTurn> {
        match self.phase {
            Phase::Closed { epoch: closed } if closed == epoch => {
                self.phase = Phase::Abandoned { epoch };
                Ok(())
            }
            Phase::Abandoned { .. } | Phase::Collecting | Phase::Unarmed => Ok(()),
            _ => Err(self.out_of_turn("abandoning", epoch)),
        }
    }

    /// What became of the request on its way.
    ///
    /// A refused BUFFER changed nothing, so that a later epoch may be closed instead. Any other failure breaks
    /// the alternation for good.
    pub fn outcome(&mut self, outcome: Outcome) {
        self.phase = match (self.phase, outcome) {
            (Phase::Closing { epoch }, Outcome::Done) => {
                self.last = Some(epoch);
                Phase::Closed { epoch }
            }
            (Phase::Closing { .. }, Outcome::Refused) | (Phase::Releasing { .. }, Outcome::Done) => Phase::Collecting,
            (Phase::Closing { epoch } | Phase::Releasing { epoch }, _) => Phase::Broken { epoch },
            (phase, _) => phase,
        };
    }

    /// Whether a request is on its way.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::Closing { .. } | Phase::Releasing { .. })
    }

    /// The qdisc was replaced by a new, empty and closed one, and what it held is lost. A closed epoch stays
    /// closed: releasing it then releases nothing, as the new qdisc's count says. A plug that let everything
    /// flow has to be told so again: send what is returned.
    #[must_use]
    pub fn replaced(&mut self) -> Option<PlugOp> {
        (self.phase == Phase::Flowing).then_some(PlugOp::ReleaseIndefinite)
    }

    /// The qdisc's counters are known to be wrong and it could not be replaced: nothing may be asked of it any
    /// more.
    pub fn give_up(&mut self) {
        if self.phase != Phase::Unarmed {
            let epoch = self.last.unwrap_or(0);
            self.phase = Phase::Broken { epoch };
        }
    }

    /// Everything may flow: this host owns the guest for good. Possible at any time; send what is returned.
    pub fn flow(&mut self) -> PlugOp {
        self.phase = Phase::Flowing;
        PlugOp::ReleaseIndefinite
    }
}

#[cfg(test)]
#[path = "plug_state_tests.rs"]
mod tests;
