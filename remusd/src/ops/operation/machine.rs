//! The life of one operation, sans-IO. `states.md` beside this file is every state against every input, kept true by a test.
//!
//! Three parties meet here in any order: the initiator, who is still inside its initiating call or has left it; the work, which
//! ends by itself; and whoever aborts, an operator or the daemon's end. Each input is one atomic step; what has to be done about it
//! comes back as effects, to be carried out after the lock around the machine is released.

/// Where an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The initiating call has not decided yet whether there is an operation.
    Initiating,
    /// As before, and an abort was asked for.
    InitiatingAborted,
    /// As before, past the point from which it cannot be aborted.
    InitiatingCommitted,
    /// The work has ended, but the initiating call has not decided yet: the completion waits for that, since an operation whose
    /// initiation fails has no completion.
    EndedEarly,
    /// Under way.
    Running,
    /// Under way, and the work was told to give up.
    Aborting,
    /// Under way, past the point from which it cannot be aborted.
    Committed,
    /// The completion is on its way to the initiator.
    Delivering,
    /// The initiator has it; or there was nothing to deliver.
    Over,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 9] = [
        Self::Initiating,
        Self::InitiatingAborted,
        Self::InitiatingCommitted,
        Self::EndedEarly,
        Self::Running,
        Self::Aborting,
        Self::Committed,
        Self::Delivering,
        Self::Over,
    ];

    /// Whether the work may still be doing something.
    #[must_use]
    pub fn works(self) -> bool {
        !matches!(self, Self::EndedEarly | Self::Delivering | Self::Over)
    }
}

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The initiating call succeeds.
    Begun,
    /// The initiating call fails: the initiator gets the error from it and nothing else, ever.
    InitiationFailed,
    /// Somebody wants it aborted.
    Abort,
    /// The work asks to go past the point from which it cannot be aborted.
    PointOfNoReturn,
    /// The work has ended, whichever way.
    WorkEnded,
    /// The daemon's end waits no longer.
    GivenUp,
    /// The initiator has its completion.
    Delivered,
}

impl Input {
    /// Every input.
    pub const ALL: [Self; 7] = [
        Self::Begun,
        Self::InitiationFailed,
        Self::Abort,
        Self::PointOfNoReturn,
        Self::WorkEnded,
        Self::GivenUp,
        Self::Delivered,
    ];
}

/// What an input leads to besides the next phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Keep the outcome that came with the input; every other one is dropped.
    KeepOutcome,
    /// Give the kept outcome to the initiator. Happens once in the life of an operation, or never.
    Deliver,
    /// Tell the work to give up.
    TellWork,
    /// Forget the operation.
    Forget,
    /// Answer to [`Input::Abort`]: asked for; the completion follows.
    AbortAsked,
    /// Answer to [`Input::Abort`]: too late to be safe.
    AbortRefused,
    /// Answer to [`Input::Abort`]: the work has ended.
    AbortTooLate,
    /// Answer to [`Input::PointOfNoReturn`]: go on.
    Proceed,
    /// Answer to [`Input::PointOfNoReturn`]: an abort was faster; give up.
    GiveUp,
}

/// The state machine of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    phase: Phase,
}

impl Default for Machine {
    fn default() -> Self {
        Self { phase: Phase::Initiating }
    }
}

impl Machine {
    /// Where it is.
    #[must_use]
    pub fn phase(self) -> Phase {
        self.phase
    }

    #[cfg(test)]
    pub(super) fn at(phase: Phase) -> Self {
        Self { phase }
    }

    /// One atomic step. A pair that makes no sense changes nothing: late words of a work that was given up, a second abort.
    pub fn step(&mut self, input: Input) -> &'static [Effect] {
        use Effect::{AbortAsked, AbortRefused, AbortTooLate, Deliver, Forget, GiveUp, KeepOutcome, Proceed, TellWork};
        use Phase::{
            Aborting, Committed, Delivering, EndedEarly, Initiating, InitiatingAborted, InitiatingCommitted, Over,
            Running,
        };
        let phase = self.phase;
        let (next, effects): (Phase, &'static [Effect]) = match (phase, input) {
            (Initiating, Input::Begun) => (Running, &[]),
            (InitiatingAborted, Input::Begun) => (Aborting, &[]),
            (InitiatingCommitted, Input::Begun) => (Committed, &[]),
            (EndedEarly, Input::Begun) => (Delivering, &[Deliver]),

            // The work, if it was started at all, is told to stop: nothing is left behind.
            (Initiating | InitiatingCommitted, Input::InitiationFailed) => (Over, &[TellWork, Forget]),
            (InitiatingAborted | EndedEarly, Input::InitiationFailed) => (Over, &[Forget]),

            (Initiating, Input::Abort) => (InitiatingAborted, &[TellWork, AbortAsked]),
            (Running, Input::Abort) => (Aborting, &[TellWork, AbortAsked]),
            (InitiatingAborted | Aborting, Input::Abort) => (phase, &[AbortAsked]),
            (InitiatingCommitted | Committed, Input::Abort) => (phase, &[AbortRefused]),
            (EndedEarly | Delivering | Over, Input::Abort) => (phase, &[AbortTooLate]),

            (Initiating, Input::PointOfNoReturn) => (InitiatingCommitted, &[Proceed]),
            (Running, Input::PointOfNoReturn) => (Committed, &[Proceed]),
            (InitiatingCommitted | Committed, Input::PointOfNoReturn) => (phase, &[Proceed]),
            (InitiatingAborted | Aborting | EndedEarly | Delivering | Over, Input::PointOfNoReturn) => {
                (phase, &[GiveUp])
            }

            (Initiating | InitiatingAborted | InitiatingCommitted, Input::WorkEnded) => (EndedEarly, &[KeepOutcome]),
            (Running | Aborting | Committed, Input::WorkEnded) => (Delivering, &[KeepOutcome, Deliver]),

            (Initiating | InitiatingAborted | InitiatingCommitted, Input::GivenUp) => {
                (EndedEarly, &[KeepOutcome, TellWork])
            }
            (Running | Aborting | Committed, Input::GivenUp) => (Delivering, &[KeepOutcome, TellWork, Deliver]),

            (Delivering, Input::Delivered) => (Over, &[Forget]),
            _ => (phase, &[]),
        };
        self.phase = next;
        effects
    }
}
