//! The rules of the record (R3): what each intent makes of each record, as pure functions. Whatever they say is carried out by one
//! compare-and-swap against exactly the record that was looked at.

use super::record::{Attempt, Host, Position, RECORD_VERSION, Record, RecordKey, RecordState, Versioned, Watermark};
use crate::ids::{Generation, Nonce, ProtectionId};

/// What a host wants of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Primary: protection begins, or begins anew. A new generation is chosen: one more than anything seen, at least `at_least`.
    Arm {
        /// Lower bound for the generation, for a host whose own memory may be gone.
        at_least: Generation,
        /// Random.
        nonce: Nonce,
        /// The backup.
        peer: Host,
        /// Whether the backup remembers a record of this protection. Then an absent record means a wiped witness, also to a primary
        /// that was reinstalled and remembers nothing.
        peer_has_seen: bool,
    },
    /// Backup: looks for the record that its primary says it has armed; remembers it. Changes nothing.
    Accept(RecordKey),
    /// Either: wants to run the guest alone. From the moment this is asked for, nothing may be acknowledged, released or committed
    /// under the record's generation, whatever comes of it (hazards F8, F9). The owner may also be asking with the key of an earlier
    /// generation, if it crashed while arming.
    Claim(RecordKey),
    /// Winner: its copy runs.
    Activate(RecordKey),
    /// Winner: could not start. Its copy is proven gone and has never run (also: of a claim made before a restart). Also whoever has
    /// sent a claim, does not know what became of it, and has given its copy up: if the claim has not landed, the record is written
    /// anew as it is, so that the claim never will; else it could land later, and nobody would run the guest.
    Forfeit(RecordKey),
    /// Owner: protection ends, it keeps the guest. From `Armed`, or when running alone from `Active`.
    Stop(RecordKey),
    /// Owner of an armed record, its guest frozen: the peer may claim.
    HandOver(RecordKey),
    /// The operator asserts that the other host is off (or the other host has durably promised not to claim). The way out also of an
    /// absent, rolled-back or replaced witness.
    Force {
        /// Random.
        nonce: Nonce,
        /// The other host.
        peer: Host,
    },
    /// Reads, changes nothing.
    Look,
}

impl Intent {
    /// A word for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Arm { .. } => "arm",
            Self::Accept(_) => "accept",
            Self::Claim(_) => "claim",
            Self::Activate(_) => "activate",
            Self::Forfeit(_) => "forfeit",
            Self::Stop(_) => "stop",
            Self::HandOver(_) => "hand over",
            Self::Force { .. } => "force",
            Self::Look => "look",
        }
    }
}

/// Why nothing was done although nobody else is known to have the guest. Hold, tell the operator, try again later.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A host remembers a record and the witness has none.
    #[error(
        "the witness has no record of this protection although there was one: it was wiped or replaced. End protection or, with \
         the other host off, force the claim"
    )]
    Absent,
    /// The witness knows less than it did.
    #[error(
        "the witness was rolled back: {0}. It was restored from a backup while protections were armed; with the other host off, \
         force the claim"
    )]
    RolledBack(String),
    /// Another store answers.
    #[error(
        "another witness answers: {found} instead of {expected}. Configure the one that the record was armed at, or protect the \
         domain anew"
    )]
    OtherStore {
        /// Remembered identity.
        expected: String,
        /// Identity found.
        found: String,
    },
    /// Two hosts with one identity.
    #[error(
        "this host and its peer have the same identity, so the witness cannot tell them apart: one was installed as a copy of the          other. Remove the file host-id from the state folder of one of them while nothing is protected, and restart remusd there"
    )]
    SameHost,
    /// The record is not the one meant.
    #[error("the witness record is not the one that was armed ({0})")]
    OtherRecord(Box<Record>),
    /// The record is ours, but does not allow this now.
    #[error("the witness record does not allow that now ({0})")]
    WrongState(Box<Record>),
    /// The value is no record.
    #[error("{0}")]
    Unreadable(String),
}

/// What is to be done about an intent, given the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Compare-and-swap to this.
    Swap(Box<Record>),
    /// It is so already.
    Won(Box<Record>),
    /// Another host has it.
    Lost(Box<Record>),
    /// Nothing may be done.
    Refuse(Refusal),
    /// [`Intent::Look`]: this is the record.
    Seen(Box<Record>),
}

/// Refuses an answer that is older than what this host remembers (R4, hazard F7).
///
/// # Errors
/// [`Refusal::OtherStore`], [`Refusal::RolledBack`], [`Refusal::OtherRecord`] (same generation, other nonce), [`Refusal::Absent`].
pub fn check_history(floor: &Watermark, found: &Versioned) -> Result<(), Refusal> {
    if let Some(seen) = &floor.position {
        check_store(seen, &found.position)?;
        if found.position.revision < seen.revision {
            return Err(Refusal::RolledBack(format!(
                "its revision is {}, and was {}",
                found.position.revision, seen.revision
            )));
        }
        if found.record.is_some() && found.position.modified < seen.modified {
            return Err(Refusal::RolledBack(format!(
                "the record's revision is {}, and was {}",
                found.position.modified, seen.modified
            )));
        }
    }
    match (&found.record, floor.key) {
        (None, Some(_)) => Err(Refusal::Absent),
        (Some(r), Some(key)) if r.generation < key.generation => {
            Err(Refusal::RolledBack(format!("the record's generation is {}, and was {}", r.generation, key.generation)))
        }
        (Some(r), Some(key)) if r.generation == key.generation && r.nonce != key.nonce => {
            Err(Refusal::OtherRecord(Box::new(r.clone())))
        }
        _ => Ok(()),
    }
}

/// Refuses an answer of another store.
///
/// # Errors
/// [`Refusal::OtherStore`].
pub fn check_store(seen: &Position, found: &Position) -> Result<(), Refusal> {
    if seen.store == found.store {
        return Ok(());
    }
    Err(Refusal::OtherStore { expected: seen.store.clone(), found: found.store.clone() })
}

/// What `intent` of host `me` makes of `found`. A value written in this very run (same `attempt`) is not for here: that is won.
#[must_use]
pub fn step(
    me: &Host,
    uuid: ProtectionId,
    intent: &Intent,
    attempt: Attempt,
    found: Option<&Record>,
    watermark: &Watermark,
) -> Step {
    let next = |at_least: Generation| {
        let seen = found.map_or(0, |r| r.generation.0).max(watermark.generation().0);
        Generation(at_least.0.max(seen.saturating_add(1)))
    };
    let fresh = |generation, nonce, state, peer: &Host| {
        let (owner, peer) = (me.clone(), peer.clone());
        Step::Swap(Box::new(Record { version: RECORD_VERSION, uuid, generation, nonce, state, owner, peer, attempt }))
    };
    match intent {
        Intent::Arm { peer, .. } | Intent::Force { peer, .. } if peer.is(me) => return Step::Refuse(Refusal::SameHost),
        Intent::Force { nonce, peer } => return fresh(next(Generation(1)), *nonce, RecordState::Claimed, peer),
        Intent::Arm { at_least, nonce, peer, peer_has_seen: false } if found.is_none() && watermark.key.is_none() => {
            return fresh(next(*at_least), *nonce, RecordState::Armed, peer);
        }
        _ => {}
    }
    let Some(found) = found else { return Step::Refuse(Refusal::Absent) };
    let owned = found.owner.is(me);
    let to = |state| {
        let peer = if owned { found.peer.clone() } else { found.owner.clone() };
        Step::Swap(Box::new(Record { state, owner: me.clone(), peer, attempt, ..found.clone() }))
    };
    let won = || Step::Won(Box::new(found.clone()));
    let lost = || Step::Lost(Box::new(found.clone()));
    let wrong = || Step::Refuse(Refusal::WrongState(Box::new(found.clone())));
    use RecordState as S;
    let key = match intent {
        Intent::Look => return Step::Seen(Box::new(found.clone())),
        Intent::Arm { at_least, nonce, peer, .. } => {
            return match found.state {
                _ if !owned => lost(),
                S::Armed | S::Claimed | S::Active | S::Stopped => fresh(next(*at_least), *nonce, S::Armed, peer),
                // Given away or given up: it has to be claimed back first.
                S::Forfeited | S::HandedTo => wrong(),
            };
        }
        Intent::Force { .. } => unreachable!("answered above"),
        Intent::Accept(key)
        | Intent::Claim(key)
        | Intent::Activate(key)
        | Intent::Forfeit(key)
        | Intent::Stop(key)
        | Intent::HandOver(key) => key,
    };
    // A host that crashed (or lost patience) after its arming or forcing was applied and before it had noted the new key still owns the
    // record, and its peer cannot know the key either: without this nobody could ever run the guest.
    if owned && found.generation > key.generation {
        return match (intent, found.state) {
            (Intent::Claim(_), S::Armed | S::Claimed | S::Stopped) => to(S::Claimed),
            (Intent::Claim(_), S::Active) => to(S::Active),
            (Intent::Stop(_), S::Armed | S::Active) => to(S::Stopped),
            _ => wrong(),
        };
    }
    if found.key() != *key {
        return if found.generation < key.generation {
            Step::Refuse(Refusal::RolledBack(format!(
                "the record's generation is {}, and was {}",
                found.generation, key.generation
            )))
        } else if found.generation > key.generation {
            lost() // somebody armed or forced it since
        } else {
            Step::Refuse(Refusal::OtherRecord(Box::new(found.clone())))
        };
    }
    match intent {
        Intent::Accept(_) => match found.state {
            S::Armed if found.peer.is(me) => won(),
            _ if owned => wrong(),
            _ => lost(),
        },
        Intent::Claim(_) => match found.state {
            S::Armed | S::HandedTo if owned || found.peer.is(me) => to(S::Claimed),
            S::Forfeited if found.peer.is(me) => to(S::Claimed),
            // Ours from before a restart. Written anew under this attempt, so that no delayed request of that earlier life (a
            // forfeit, say) can be applied after we have acted.
            S::Claimed | S::Stopped if owned => to(S::Claimed),
            S::Active if owned => to(S::Active),
            _ => lost(),
        },
        Intent::Forfeit(_)
            if !owned && found.peer.is(me) && matches!(found.state, S::Armed | S::HandedTo | S::Forfeited) =>
        {
            Step::Swap(Box::new(Record { attempt, ..found.clone() }))
        }
        _ if !owned => lost(),
        Intent::Activate(_) => match found.state {
            S::Claimed => to(S::Active),
            S::Active => won(),
            _ => wrong(),
        },
        Intent::Forfeit(_) => match found.state {
            S::Claimed => to(S::Forfeited),
            S::Forfeited => won(),
            _ => wrong(),
        },
        Intent::Stop(_) => match found.state {
            S::Armed | S::Active => to(S::Stopped),
            S::Stopped => won(),
            _ => wrong(),
        },
        Intent::HandOver(_) => match found.state {
            S::Armed => to(S::HandedTo),
            S::HandedTo => won(),
            _ => wrong(),
        },
        Intent::Arm { .. } | Intent::Force { .. } | Intent::Look => unreachable!("answered above"),
    }
}
