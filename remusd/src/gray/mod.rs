//! Failures that a heartbeat hides or invents (hazard F22), told apart: each has a name, an event when it begins and ends, and one
//! defined outcome. docs/gray-failures.md has the table. Sans-IO; no clock either: what is told here is counted in heartbeats.
//!
//! Nothing here is about safety: who may run is decided by the token and the witness, whatever anybody suspects (R3).

use std::fmt;
use std::time::Duration;

use crate::ids::Epoch;
use crate::link::{GuestState, Heartbeat};

/// Which half of a protection looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one whose guest runs.
    Primary,
    /// The one that holds the copy.
    Backup,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// We hear the other side, it does not hear us.
    OneWay,
    /// Primary: the backup talks, but acknowledges nothing.
    AckLate,
    /// The guest does not react to suspend requests: there are no new checkpoints.
    NotSuspending,
    /// The guest has been standing still for far longer than a checkpoint takes.
    StuckSuspended,
    /// The other host's timers are late: it is starved.
    PeerStarved,
    /// This host's timers are late.
    SelfStarved,
    /// Backup: the guest could not run here and be reached: no carrier, the check of the network failed, its name is taken.
    CutOff,
}

impl Condition {
    /// All, in a fixed order.
    pub const ALL: [Self; 7] = [
        Self::OneWay,
        Self::AckLate,
        Self::NotSuspending,
        Self::StuckSuspended,
        Self::PeerStarved,
        Self::SelfStarved,
        Self::CutOff,
    ];

    /// What follows from it on this side.
    #[must_use]
    pub fn outcome(self, side: Side) -> Outcome {
        match (self, side) {
            (Self::OneWay | Self::AckLate, Side::Primary) => Outcome::BackupLost,
            // The primary decides: it holds the guest, and learns the same from our heartbeats.
            (Self::OneWay, Side::Backup) => Outcome::Told,
            (Self::CutOff, Side::Backup) => Outcome::Abstains,
            (Self::SelfStarved, _) => Outcome::SilenceNotCounted,
            // The primary has deadlines of its own for these (`suspend_deadline_ms`, `pause_deadline_ms`); nobody else could mend them.
            (Self::NotSuspending | Self::StuckSuspended | Self::PeerStarved, _)
            | (Self::AckLate, Side::Backup)
            | (Self::CutOff, Side::Primary) => Outcome::Told,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::OneWay => "the link carries one way only: the other host is heard and does not hear this one",
            Self::AckLate => "the backup talks but acknowledges nothing",
            Self::NotSuspending => "the guest does not react to suspend requests, so there are no new checkpoints",
            Self::StuckSuspended => "the guest stands still for far longer than a checkpoint takes",
            Self::PeerStarved => "the other host is starved: its timers are late",
            Self::SelfStarved => "this host is starved: its timers are late",
            Self::CutOff => "the guest could not run on this host and be reached",
        }
    }
}

/// What follows from a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The primary takes the backup for lost and arbitrates.
    BackupLost,
    /// The backup does not claim by itself as long as it lasts.
    Abstains,
    /// The detector starts anew: nobody is suspected because we did not listen.
    SilenceNotCounted,
    /// An event and nothing more.
    Told,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackupLost => "the backup counts as lost",
            Self::Abstains => "this host does not take the guest over by itself",
            Self::SilenceNotCounted => "silence is not counted meanwhile",
            Self::Told => "nothing follows from it here",
        })
    }
}

/// What one side sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A heartbeat of the other side.
    Beat(Heartbeat),
    /// Our own timers came so late.
    Starved(Duration),
    /// An ended epoch is not acknowledged for so long although the backup talks.
    AckLate(Epoch),
    /// Whether the guest could run here and be reached.
    Reachable(bool),
}

/// What a heartbeat shows, taken alone.
#[must_use]
pub fn classify(side: Side, detection: Duration, beat: &Heartbeat) -> Vec<Condition> {
    let ms = |ms: u64| Duration::from_millis(ms);
    let mut found = Vec::new();
    // A host that was just frozen has heard nothing, and neither has it read what waits for it.
    if !beat.late && ms(beat.heard_ms.into()) >= detection {
        found.push(Condition::OneWay);
    }
    if side == Side::Backup {
        match beat.guest {
            GuestState::Stuck => found.push(Condition::NotSuspending),
            GuestState::Suspended if ms(beat.since_resume_ms) >= stuck_after(detection) => {
                found.push(Condition::StuckSuspended);
            }
            _ => {}
        }
    }
    if beat.late {
        found.push(Condition::PeerStarved);
    }
    found
}

/// How long since its last resume a guest that stands still is no longer in a checkpoint. Includes the interval before it.
fn stuck_after(detection: Duration) -> Duration {
    (detection * 5).max(Duration::from_secs(10))
}

/// A condition that began or ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub condition: Condition,
    /// Whether it is there now.
    pub began: bool,
    /// What follows from it here.
    pub outcome: Outcome,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.condition.words();
        if self.began { write!(f, "{words}; {}", self.outcome) } else { write!(f, "over: {words}") }
    }
}

/// Heartbeats in a row that must show a condition before it is told.
const TO_BEGIN: u8 = 3;
/// Heartbeats in a row without it before it is over.
const TO_END: u8 = 10;

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    told: bool,
    /// Heartbeats in a row that say otherwise than what was told.
    against: u8,
}

/// Follows one session and tells each change once.
#[derive(Debug)]
pub struct Watch {
    side: Side,
    detection: Duration,
    counts: [Count; Condition::ALL.len()],
}

impl Watch {
    /// For the primary of a session with this detection time.
    #[must_use]
    pub fn primary(detection: Duration) -> Self {
        Self { side: Side::Primary, detection, counts: Default::default() }
    }

    /// For the backup.
    #[must_use]
    pub fn backup(detection: Duration) -> Self {
        Self { side: Side::Backup, ..Self::primary(detection) }
    }

    /// Takes what was seen; returns what began or ended by it.
    pub fn see(&mut self, seen: Seen) -> Vec<Change> {
        match seen {
            Seen::Beat(beat) => {
                let shown = classify(self.side, self.detection, &beat);
                let mut changes = Vec::new();
                for condition in Condition::ALL {
                    // This one only its own check can end.
                    if condition != Condition::CutOff {
                        changes.extend(self.count(condition, shown.contains(&condition)));
                    }
                }
                changes
            }
            Seen::Starved(_) => self.tell(Condition::SelfStarved, true).into_iter().collect(),
            Seen::AckLate(_) => self.tell(Condition::AckLate, true).into_iter().collect(),
            Seen::Reachable(reachable) => self.tell(Condition::CutOff, !reachable).into_iter().collect(),
        }
    }

    fn count(&mut self, condition: Condition, shown: bool) -> Option<Change> {
        let count = &mut self.counts[condition as usize];
        if shown == count.told {
            count.against = 0;
            return None;
        }
        count.against += 1;
        let enough = if count.told { TO_END } else { TO_BEGIN };
        if count.against < enough { None } else { self.tell(condition, shown) }
    }

    fn tell(&mut self, condition: Condition, began: bool) -> Option<Change> {
        let count = &mut self.counts[condition as usize];
        count.against = 0;
        if count.told == began {
            return None;
        }
        count.told = began;
        Some(Change { condition, began, outcome: condition.outcome(self.side) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DETECTION: Duration = Duration::from_secs(1);

    fn well() -> Heartbeat {
        Heartbeat {
            epoch: Epoch(1),
            guest: GuestState::Running,
            since_resume_ms: 200,
            wall_clock_ms: 0,
            late: false,
            heard_ms: 100,
        }
    }

    fn ill() -> [(Heartbeat, Condition); 4] {
        [
            (Heartbeat { heard_ms: 1000, ..well() }, Condition::OneWay),
            (Heartbeat { guest: GuestState::Stuck, ..well() }, Condition::NotSuspending),
            (Heartbeat { guest: GuestState::Suspended, since_resume_ms: 10_000, ..well() }, Condition::StuckSuspended),
            (Heartbeat { late: true, heard_ms: 60_000, ..well() }, Condition::PeerStarved),
        ]
    }

    #[test]
    fn each_is_told_apart() {
        assert_eq!(classify(Side::Backup, DETECTION, &well()), []);
        for (beat, condition) in ill() {
            assert_eq!(classify(Side::Backup, DETECTION, &beat), [condition]);
        }
        // A checkpoint, also a slow one, is no failure.
        let checkpoint = Heartbeat { guest: GuestState::Suspended, since_resume_ms: 4000, ..well() };
        assert_eq!(classify(Side::Backup, DETECTION, &checkpoint), []);
    }

    #[test]
    fn the_guest_is_the_primarys_own() {
        for (beat, condition) in ill() {
            let found = classify(Side::Primary, DETECTION, &beat);
            let guests = matches!(condition, Condition::NotSuspending | Condition::StuckSuspended);
            assert_eq!(found.is_empty(), guests, "{condition:?}");
        }
    }

    #[test]
    fn only_what_lasts_is_told_once_and_its_end_too() {
        for (beat, condition) in ill() {
            let mut watch = Watch::backup(DETECTION);
            let mut told = Vec::new();
            for beat in [beat, beat, well(), beat, beat] {
                told.extend(watch.see(Seen::Beat(beat)));
            }
            assert_eq!(told, [], "{condition:?}: twice is not yet a condition");
            told.extend(watch.see(Seen::Beat(beat)));
            told.extend(watch.see(Seen::Beat(beat)));
            assert_eq!(told, [Change { condition, began: true, outcome: condition.outcome(Side::Backup) }]);
            told.clear();
            for _ in 0..20 {
                told.extend(watch.see(Seen::Beat(well())));
            }
            assert_eq!((told.len(), told[0].condition, told[0].began), (1, condition, false));
        }
    }

    #[test]
    fn what_we_know_ourselves_is_told_at_once() {
        let mut watch = Watch::primary(DETECTION);
        for (seen, condition) in [
            (Seen::Starved(DETECTION), Condition::SelfStarved),
            (Seen::AckLate(Epoch(4)), Condition::AckLate),
            (Seen::Reachable(false), Condition::CutOff),
        ] {
            let told = watch.see(seen);
            assert_eq!((told.len(), told[0].condition, told[0].began), (1, condition, true));
            assert_eq!(watch.see(seen), []);
        }
        for _ in 0..20 {
            watch.see(Seen::Beat(well()));
        }
        assert_eq!(watch.see(Seen::Starved(DETECTION)).len(), 1, "it had been over");
        assert_eq!(watch.see(Seen::Reachable(false)), [], "heartbeats do not end what they do not show");
        assert!(!watch.see(Seen::Reachable(true))[0].began);
    }

    #[test]
    fn only_the_primary_acts_on_a_link_and_only_the_backup_on_its_lan() {
        let acting = |side| Condition::ALL.into_iter().filter(move |c| c.outcome(side) != Outcome::Told);
        assert_eq!(
            acting(Side::Primary).collect::<Vec<_>>(),
            [Condition::OneWay, Condition::AckLate, Condition::SelfStarved]
        );
        assert_eq!(acting(Side::Backup).collect::<Vec<_>>(), [Condition::SelfStarved, Condition::CutOff]);
    }

    proptest! {
        /// Whatever comes, beginnings and ends of one condition alternate, and a host that was only frozen is never a one-way link.
        #[test]
        fn beginnings_and_ends_alternate(
            beats in prop::collection::vec((0u32..3000, 0usize..5, 0u64..20_000, any::<bool>()), 0..200),
        ) {
            let mut watch = Watch::backup(DETECTION);
            let mut there = [false; Condition::ALL.len()];
            for (heard_ms, guest, since_resume_ms, late) in beats {
                let guest = [
                    GuestState::Unknown,
                    GuestState::Running,
                    GuestState::Suspended,
                    GuestState::Stuck,
                    GuestState::Shutdown,
                ][guest];
                let beat = Heartbeat { heard_ms, guest, since_resume_ms, late, ..well() };
                for change in watch.see(Seen::Beat(beat)) {
                    prop_assert_ne!(there[change.condition as usize], change.began);
                    there[change.condition as usize] = change.began;
                    prop_assert!(!(change.condition == Condition::OneWay && change.began && late));
                }
            }
        }
    }
}
