//! Sees everything and holds it against the safety rules (DESIGN section 3).

use std::fmt;

use super::guest::{CopyId, Memory, Packet, Run};
use super::history::{Histories, Moment};
use super::plan::{HostIx, MS, Micros};
use super::world::{Event, World};
use super::{PAUSE_DEADLINE, SUSPEND_DEADLINE};
use crate::link::Token;
use crate::protect::machine::OnBackupLoss;

/// A safety rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // The names are DESIGN's.
pub enum Rule {
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::R1 => "output commit",
            Self::R2 => "atomic epochs",
            Self::R3 => "one live copy",
            Self::R4 => "no stale activation",
            Self::R5 => "disk equals memory",
            Self::R6 => "no unbounded stop",
            Self::R7 => "integrity",
            Self::R8 => "bounded memory",
            Self::R9 => "fail closed",
        };
        write!(f, "{self:?} ({words})")
    }
}

/// A rule was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// How.
    pub text: String,
    /// When, in microseconds.
    pub at: Micros,
}

/// What an epoch was when it was captured.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    /// Which session and epoch.
    pub id: (u64, u64),
    /// The guest's memory.
    pub memory: Memory,
    /// Its state.
    pub moment: Moment,
    /// Whether output was held from there on.
    pub armed: bool,
    /// Whether the guest stood still throughout.
    pub still: bool,
}

/// The observer.
#[derive(Debug, Default)]
pub struct Oracle {
    /// The first violation.
    pub violation: Option<Violation>,
    /// Everything has come to a good end.
    pub settled: bool,
    /// All lives.
    pub histories: Histories,
    /// Something that decides about exposure has changed.
    pub exposure_changed: bool,
    /// The latest moment that somebody outside has seen, and of which copy.
    seen: Option<(Moment, CopyId)>,
    /// What was captured.
    pub snapshots: Vec<Snapshot>,
    /// Per session the newest acknowledged epoch.
    acked: Vec<(u64, u64)>,
    /// Copies that were started from an epoch, with its session.
    pub started: Vec<(CopyId, u64)>,
    /// The guest has ended by itself and that is recorded: no copy may ever run again.
    pub ended: bool,
    /// When each copy's output was last let go or not held, for R6.
    released: Vec<Micros>,
    next_look: Micros,
    /// Sessions whose primary goes on alone: what the backup still holds of them is stale, and the primary has said so.
    pub given_up: Vec<u64>,
    /// When each host last lost its guest.
    pub gone: [Option<Micros>; 2],
    /// An operator has said that the other host is off.
    pub asserted: bool,
    /// An epoch was damaged on its way.
    pub damaged: bool,
}

/// How long output may be held, counted from the last release, while the primary's own host is well and its policy or witness lets it
/// go on alone: acknowledgement deadline, stop deadline and arbitration, twice, for what else may be slow.
const HELD: Micros = 1500 * MS;

/// How much longer than its deadlines a guest may stand still, for slow work in between.
const STILL_SLACK: Micros = 60 * MS;

/// How long everything may take to come to a good end once nothing fails any more.
const SETTLING: Micros = 6000 * MS;

impl Oracle {
    /// The snapshot of an epoch.
    #[must_use]
    pub fn snapshot(&self, session: u64, epoch: u64) -> Option<&Snapshot> {
        self.snapshots.iter().rev().find(|s| s.id == (session, epoch))
    }

    /// Whether the copy of this host was started from an epoch.
    #[must_use]
    pub fn given_away(&self, host: HostIx, copies: &[super::guest::Copy]) -> bool {
        self.started.iter().any(|(copy, _)| copies[*copy].host == host && copies[*copy].exists())
    }

    fn acked(&self, session: u64) -> Option<u64> {
        self.acked.iter().rev().find(|(s, _)| *s == session).map(|(_, epoch)| *epoch)
    }
}

impl World {
    /// A rule is broken; the first time counts.
    pub fn violate(&mut self, rule: Rule, text: String) {
        self.note(|_| format!("VIOLATION of {rule}: {text}"));
        let at = self.now;
        self.oracle.violation.get_or_insert(Violation { rule, text, at });
    }

    /// Somebody outside sees this.
    pub(super) fn judge_output(&mut self, packet: &Packet) {
        if self.oracle.ended {
            self.violate(Rule::R3, format!("copy {} answers although the guest's end is recorded", packet.copy));
        }
        if let Some((session, epoch)) = packet.epoch
            && !self.copies[packet.copy].flowing
            && self.copies[packet.copy].redirected
            && self.oracle.acked(session).is_none_or(|acked| acked < epoch)
        {
            self.violate(Rule::R1, format!("output of epoch {epoch} is seen before its acknowledgement"));
        }
        let Some((seen, by)) = self.oracle.seen else {
            self.oracle.seen = Some((packet.moment, packet.copy));
            return;
        };
        if self.oracle.histories.contains(packet.moment, seen) {
            self.oracle.seen = Some((packet.moment, packet.copy));
        } else if !self.oracle.histories.contains(seen, packet.moment) {
            let rule = if by == packet.copy { Rule::R1 } else { Rule::R3 };
            self.violate(rule, format!("copies {by} and {} both answer, with different pasts", packet.copy));
        }
    }

    /// After every event.
    pub(super) fn watch(&mut self) {
        if std::mem::take(&mut self.oracle.exposure_changed) {
            self.judge_exposure();
        }
        if self.now >= self.oracle.next_look {
            self.oracle.next_look = self.now + 5 * MS;
            self.judge_standstill();
        }
    }

    /// Whether the guest is on this host, or was no longer ago than a host may be silent without being suspected: nobody can know better
    /// of the other one.
    #[must_use]
    pub fn had_guest(&self, host: HostIx) -> bool {
        self.name_taken(host) || self.oracle.gone[host].is_some_and(|gone| self.now < gone + super::DETECTION)
    }

    fn judge_exposure(&mut self) {
        let exposed: Vec<CopyId> = (0..2)
            .filter_map(|host| self.hosts[host].guest)
            .filter(|copy| self.copies[*copy].exposed() && self.hosts[self.copies[*copy].host].up)
            .collect();
        if let [one, other] = exposed[..] {
            self.violate(Rule::R3, format!("copies {one} and {other} are live at once"));
        }
        for copy in exposed {
            if let Some((seen, _)) = self.oracle.seen
                && !self.oracle.histories.contains(self.copies[copy].moment, seen)
            {
                self.violate(Rule::R1, format!("copy {copy} is live but knows nothing of output that was seen"));
            }
        }
    }

    fn judge_standstill(&mut self) {
        self.oracle.released.resize(self.copies.len(), self.now);
        for host in 0..2 {
            let Some(copy) = self.hosts[host].guest else { continue };
            let this = &self.copies[copy];
            let here = &self.hosts[host];
            if !here.up || here.daemon.is_none() || self.still_until(host).is_some() {
                self.oracle.released[copy] = self.now;
                continue;
            }
            let since = this.suspended_at.max(here.disturbed);
            if this.run == Run::Suspended
                && !this.paused
                && !self.handing_over(host)
                && self.now > since + PAUSE_DEADLINE + SUSPEND_DEADLINE + STILL_SLACK
            {
                let text = format!("the guest stands still for {} ms", (self.now - since) / 1000);
                self.violate(Rule::R6, text);
                return;
            }
            let held =
                this.lives() && this.redirected && !this.flowing && this.plug.as_ref().is_some_and(|p| !p.is_empty());
            if !held || self.decided_to_hold(host) {
                self.oracle.released[copy] = self.now;
            }
            let since = self.oracle.released[copy].max(here.disturbed);
            if self.now > since + HELD {
                let text =
                    format!("output is held for {} ms though this host could go on alone", (self.now - since) / 1000);
                self.violate(Rule::R6, text);
            }
        }
    }

    /// Output was let go.
    pub fn let_go(&mut self, copy: CopyId) {
        self.oracle.released.resize(self.copies.len(), self.now);
        self.oracle.released[copy] = self.now;
    }

    /// Whether holding output here is what policy or arbitration has decided.
    fn decided_to_hold(&self, host: HostIx) -> bool {
        self.plan.on_backup_loss == OnBackupLoss::Hold || self.undecided(host)
    }

    /// The backup says that it holds an epoch.
    pub fn judge_ack(&mut self, session: u64, epoch: u64, frozen: bool, behind: usize) {
        if frozen {
            self.violate(Rule::R2, format!("epoch {epoch} is acknowledged after the activation has begun"));
        }
        if behind > super::BACKLOG_EPOCHS {
            self.violate(Rule::R8, format!("epoch {epoch} is acknowledged with {behind} older ones not taken in"));
        }
        self.oracle.acked.push((session, epoch));
    }

    /// The copy is complete: it must be exactly one captured epoch.
    pub fn judge_copy(&mut self, session: u64, epoch: u64, memory: &Memory, moment: Moment) {
        let Some(snapshot) = self.oracle.snapshot(session, epoch).copied() else {
            self.violate(Rule::R4, format!("epoch {epoch} of session {session} was never captured"));
            return;
        };
        if !snapshot.armed {
            self.violate(Rule::R4, format!("epoch {epoch} was not armed"));
        }
        if snapshot.memory != *memory || snapshot.moment != moment || !snapshot.still {
            let rule = if self.oracle.damaged { Rule::R7 } else { Rule::R2 };
            let text = format!("the copy built from epoch {epoch} is not what was captured");
            self.violate(rule, text);
        }
    }

    /// A primary gives its guest away: it must stand still exactly where the epoch was captured.
    pub fn judge_hand_over(&mut self, copy: CopyId, session: u64, epoch: u64) {
        let this = &self.copies[copy];
        let captured = self.oracle.snapshot(session, epoch).map(|snapshot| snapshot.moment);
        if this.run != Run::Suspended || captured != Some(this.moment) {
            self.violate(Rule::R1, format!("the guest is handed over after epoch {epoch} and has lived on since"));
        }
    }

    /// A copy begins to live from an epoch of a session.
    pub fn judge_start(&mut self, copy: CopyId, session: u64) {
        self.oracle.started.push((copy, session));
        let host = self.copies[copy].host;
        let by_witness = self.hosts[host].disk.incoming.is_some_and(|record| record.token != Token::Primary);
        if by_witness && !self.witness.spoiled && !self.oracle.asserted && !self.owns_record(host) {
            self.violate(Rule::R3, format!("copy {copy} is started without owning the record"));
        }
        if self.oracle.ended {
            self.violate(Rule::R3, "a copy is started although the guest's end is recorded".into());
        }
        if let Some((seen, _)) = self.oracle.seen
            && !self.oracle.histories.contains(self.copies[copy].moment, seen)
        {
            self.violate(Rule::R1, "output was seen that the started copy knows nothing of".into());
        }
    }

    /// A primary destroys its copy because another one runs.
    pub fn judge_give_up(&mut self, host: HostIx) {
        let elsewhere = self.oracle.started.iter().any(|(copy, _)| self.copies[*copy].host != host);
        if !elsewhere {
            self.violate(Rule::R9, "a copy is destroyed for another one that never ran".into());
        }
    }

    pub(super) fn settle(&mut self) {
        let calm = self.now - self.plan.calm_from;
        if calm == 0 {
            self.note(|_| "no more faults".into());
            self.end_all_faults();
        }
        let exists = |copy: CopyId| self.copies[copy].exists();
        let domains = (0..2).filter(|host| self.hosts[*host].guest.is_some_and(exists)).count();
        let incoming = (0..2).any(|host| self.can_activate(host));
        let answered = self.client.asked_in_calm.is_some_and(|asked| self.client.answered >= asked);
        let quiet = (0..2).all(|host| self.is_quiet(host));
        let good = if domains == 0 && !incoming { true } else { domains == 1 && answered };
        if calm > 250 * MS && good && quiet && self.disks_rest() {
            self.oracle.settled = true;
        } else if calm > SETTLING {
            let states: Vec<String> = (0..2).map(|host| self.describe(host)).collect();
            self.violate(Rule::R6, format!("nothing answers the client for good: {}", states.join("; ")));
        } else {
            self.after(25 * MS, Event::Settle);
        }
    }

    fn end_all_faults(&mut self) {
        for host in 0..2 {
            self.hosts[host].start_fails = false;
            self.hosts[host].damage = false;
        }
    }
}

impl World {
    /// What happened in this run, counted.
    #[must_use]
    pub fn tally(&self) -> super::campaign::Tally {
        super::campaign::Tally {
            acked: self.oracle.acked.len() as u64,
            started: self.oracle.started.len() as u64,
            answers: self.client.answers.len() as u64,
        }
    }
}
