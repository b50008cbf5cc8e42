//! What the world is told of who decides and who has won.

use super::super::machine::Event;
use crate::link::Token;
use crate::ops::EventKind;

/// What an answer of the witness means for this host, if it decides anything.
pub(super) fn arbitration(event: &Event) -> Option<(EventKind, String)> {
    match event {
        Event::ClaimWon(key) => Some((
            EventKind::ArbitrationWon,
            format!("the witness's record (generation {}) is this host's: the guest goes on here", key.generation),
        )),
        Event::ClaimLost(text) | Event::RecordLost(text) => {
            Some((EventKind::ArbitrationLost, format!("the witness has given the guest to the other host: {text}")))
        }
        _ => None,
    }
}

/// Who decides from now on when one side is lost. `witness`: one is configured; `protected`: there is something to lose by it.
pub(super) fn token(token: Token, why: String, witness: bool, protected: bool) -> Vec<(EventKind, String)> {
    let key = match token {
        Token::Primary if !witness => return vec![(EventKind::WhoDecides, why)],
        Token::Primary => None,
        Token::Witness(key) => Some(key),
    };
    let Some(key) = key else {
        let text =
            format!("the token is the primary's ({why}): if this host fails only an operator can activate the copy");
        let weakened = protected.then(|| (EventKind::Degraded, format!("the witness does not decide: {why}")));
        return std::iter::once((EventKind::WhoDecides, text)).chain(weakened).collect();
    };
    let text = format!("the witness decides who goes on alone (record generation {})", key.generation);
    vec![(EventKind::WhoDecides, text)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, Nonce};
    use crate::link::RecordKey;

    const KEY: RecordKey = RecordKey { generation: Generation(7), nonce: Nonce(uuid::Uuid::nil()) };

    #[test]
    fn only_an_answer_that_decides_is_told_as_won_or_lost() {
        let kind = |event| arbitration(&event).map(|(kind, _)| kind);
        assert_eq!(kind(Event::ClaimWon(KEY)), Some(EventKind::ArbitrationWon));
        assert!(arbitration(&Event::ClaimWon(KEY)).unwrap().1.contains("generation 7"));
        assert_eq!(kind(Event::ClaimLost("b has it".into())), Some(EventKind::ArbitrationLost));
        assert_eq!(kind(Event::RecordLost("b has it".into())), Some(EventKind::ArbitrationLost));
        for undecided in [Event::ClaimUnknown, Event::WitnessUp, Event::RecordStopped, Event::ClaimRefused("x".into())]
        {
            assert_eq!(kind(undecided.clone()), None, "{undecided:?}");
        }
    }

    #[test]
    fn a_protection_whose_witness_falls_away_is_degraded_and_one_without_any_is_not() {
        let kinds = |t, witness, protected| {
            token(t, "no answer".into(), witness, protected).into_iter().map(|(kind, _)| kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(Token::Primary, true, true), [EventKind::WhoDecides, EventKind::Degraded]);
        assert_eq!(kinds(Token::Primary, true, false), [EventKind::WhoDecides], "nothing is protected yet");
        assert_eq!(kinds(Token::Primary, false, true), [EventKind::WhoDecides]);
        assert_eq!(kinds(Token::Witness(KEY), true, true), [EventKind::WhoDecides]);
    }
}
