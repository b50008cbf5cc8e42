//! Decides about an offer to protect a guest that this host may know already: what it has of it may be stale, in the way, or all that is
//! left. Sans-IO; one machine per offer.
//!
//! A newer session gives the older one's copy up. But an offer proves only that its sender lived when it was sent: a cut may have held
//! it up, and the host may be dead since (rule R9, hazard F6). So nothing that could be activated is destroyed before the sender has
//! answered a challenge over the same connection, and that within the time after which it would be suspected in a session.

use std::time::{Duration, Instant};

use super::machine::State;
use super::record::Phase;
use crate::enforced::enforced;
use crate::ids::{Generation, Nonce};
use crate::link::RefuseCode;

/// How often a sign of life is asked for.
pub const CHALLENGES: u32 = 3;

/// What this host has of the protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// The newest session that was ever accepted, and how far it came.
    pub record: Option<(Generation, Phase)>,
    /// Where the session stands that lives in this run of the daemon.
    pub state: Option<State>,
    /// Whether the guest's domain is on this host.
    pub present: bool,
}

/// What is to be done about the offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing of an older session is in the way.
    Accept,
    /// Decline.
    Refuse(Refusal),
    /// Decline: the copy was activated and runs here.
    Superseded,
    /// Send the peer a challenge with a fresh nonce; tell [`Admission::asked`].
    Challenge,
    /// Wait for the answer until then; tell [`Admission::answered`] if there is one.
    AwaitAnswer(Instant),
    /// End the older session and destroy its copy ([`super::machine::Event::Replaced`]).
    Replace,
    /// Wait until the older session's copy is destroyed.
    AwaitEnd,
}

/// Why an offer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is not newer than this one.
    Generation(Generation),
    /// The copy is being activated, or a claim of it is still being given up.
    Activating,
    /// The peer did not answer in time, and the copy here may be the only one.
    Silent,
}

impl Refusal {
    /// As the link numbers it.
    #[must_use]
    pub fn code(self) -> RefuseCode {
        match self {
            Self::Generation(_) => RefuseCode::Generation,
            Self::Activating | Self::Silent => RefuseCode::InUse,
        }
    }
}

/// One offer.
#[derive(Clone, Debug)]
pub struct Admission {
    generation: Generation,
    limit: Duration,
    asked: Option<(Nonce, Instant)>,
    asks: u32,
    /// Until when the newest answer counts.
    alive_until: Option<Instant>,
}

impl Admission {
    /// An offer of this generation, whose sender is suspected after a silence of `limit`.
    #[must_use]
    pub fn new(generation: Generation, limit: Duration) -> Self {
        Self { generation, limit, asked: None, asks: 0, alive_until: None }
    }

    /// What is to be done now. To be asked again after whatever it says was done.
    pub fn step(&mut self, here: &Here, now: Instant) -> Step {
        let phase = here.record.map(|(_, phase)| phase);
        let active = phase == Some(Phase::Active) || here.state == Some(State::Active);
        if active && here.present {
            return Step::Superseded;
        }
        if let Some((seen, _)) = here.record
            && self.generation <= seen
        {
            return Step::Refuse(Refusal::Generation(seen));
        }
        match here.state {
            None | Some(State::Active | State::Discarded) => Step::Accept,
            Some(State::Discarding) => Step::AwaitEnd,
            Some(State::Activating | State::Claiming | State::Confirming | State::Starting | State::Forfeiting) => {
                Step::Refuse(Refusal::Activating)
            }
            // It cannot be activated: nothing is lost with it.
            Some(State::Syncing) => Step::Replace,
            Some(State::Armed | State::Waiting | State::Yielding) if !enforced("R9-newer-session-lives") => {
                Step::Replace
            }
            Some(State::Armed | State::Waiting | State::Yielding) => self.life(now),
        }
    }

    fn life(&mut self, now: Instant) -> Step {
        if self.alive_until.is_some_and(|until| now < until) {
            return Step::Replace;
        }
        match self.asked {
            Some((_, at)) if now < at + self.limit => Step::AwaitAnswer(at + self.limit),
            _ if self.asks < CHALLENGES => Step::Challenge,
            _ => Step::Refuse(Refusal::Silent),
        }
    }

    /// A challenge was sent.
    pub fn asked(&mut self, nonce: Nonce, now: Instant) {
        self.asked = Some((nonce, now));
        self.asks += 1;
    }

    /// An answer has come. One to an older challenge, or one that was too long on its way, proves nothing.
    pub fn answered(&mut self, nonce: Nonce) {
        if let Some((_, at)) = self.asked.take_if(|(asked, _)| *asked == nonce) {
            // Counted from when it was asked: the sender may have died right after it answered.
            self.alive_until = Some(at + self.limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    fn nonce(number: u128) -> Nonce {
        Nonce(uuid::Uuid::from_u128(number))
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn here(state: State) -> Here {
        Here { record: Some((Generation(4), Phase::Receiving)), state: Some(state), present: false }
    }

    fn offer() -> Admission {
        Admission::new(Generation(5), LIMIT)
    }

    const KEPT: [State; 3] = [State::Armed, State::Waiting, State::Yielding];

    #[test]
    fn a_copy_that_may_be_the_only_one_goes_only_for_a_peer_that_lives() {
        let start = Instant::now();
        for state in KEPT {
            let mut admission = offer();
            assert_eq!(admission.step(&here(state), start), Step::Challenge, "{state:?}");
            admission.asked(nonce(1), start);
            assert_eq!(admission.step(&here(state), start + ms(1)), Step::AwaitAnswer(start + LIMIT), "{state:?}");
            admission.answered(nonce(1));
            assert_eq!(admission.step(&here(state), start + ms(2)), Step::Replace, "{state:?}");
        }
    }

    /// The answer, too, may have been held up by a cut that outlived its sender.
    #[test]
    fn an_answer_that_was_long_on_its_way_is_no_life() {
        let start = Instant::now();
        let mut admission = offer();
        admission.asked(nonce(1), start);
        admission.answered(nonce(1));
        assert_eq!(admission.step(&here(State::Waiting), start + LIMIT), Step::Challenge);
    }

    #[test]
    fn an_answer_to_another_challenge_is_no_life() {
        let start = Instant::now();
        let mut admission = offer();
        admission.asked(nonce(1), start);
        admission.asked(nonce(2), start + LIMIT);
        admission.answered(nonce(1));
        assert!(matches!(admission.step(&here(State::Waiting), start + LIMIT), Step::AwaitAnswer(_)));
        admission.answered(nonce(3));
        assert!(matches!(admission.step(&here(State::Waiting), start + LIMIT), Step::AwaitAnswer(_)));
        admission.answered(nonce(2));
        assert_eq!(admission.step(&here(State::Waiting), start + LIMIT), Step::Replace);
    }

    #[test]
    fn a_peer_that_does_not_answer_is_refused_and_the_copy_kept() {
        let mut now = Instant::now();
        let mut admission = offer();
        for number in 0..CHALLENGES {
            assert_eq!(admission.step(&here(State::Waiting), now), Step::Challenge);
            admission.asked(nonce(number.into()), now);
            now += LIMIT;
        }
        assert_eq!(admission.step(&here(State::Waiting), now), Step::Refuse(Refusal::Silent));
    }

    #[test]
    fn what_an_activation_needs_is_left_alone() {
        use State::{Activating, Claiming, Confirming, Forfeiting, Starting};
        for state in [Activating, Claiming, Confirming, Starting, Forfeiting] {
            let step = offer().step(&here(state), Instant::now());
            assert_eq!(step, Step::Refuse(Refusal::Activating), "{state:?}");
        }
    }

    #[test]
    fn what_cannot_be_activated_needs_no_proof() {
        let now = Instant::now();
        assert_eq!(offer().step(&here(State::Syncing), now), Step::Replace);
        assert_eq!(offer().step(&here(State::Discarding), now), Step::AwaitEnd);
        assert_eq!(offer().step(&here(State::Discarded), now), Step::Accept);
        assert_eq!(offer().step(&Here { record: None, state: None, present: false }, now), Step::Accept);
    }

    #[test]
    fn only_a_newer_generation_is_looked_at() {
        let now = Instant::now();
        for state in KEPT {
            let step = Admission::new(Generation(4), LIMIT).step(&here(state), now);
            assert_eq!(step, Step::Refuse(Refusal::Generation(Generation(4))));
        }
    }

    #[test]
    fn a_copy_that_runs_supersedes_until_it_is_gone() {
        let now = Instant::now();
        let record = Some((Generation(4), Phase::Active));
        for state in [None, Some(State::Active)] {
            assert_eq!(offer().step(&Here { record, state, present: true }, now), Step::Superseded);
            assert_eq!(offer().step(&Here { record, state, present: false }, now), Step::Accept);
        }
    }
}
