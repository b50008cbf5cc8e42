//! Synchronising and verifying: reads units under their range lock and puts a check or the contents into the log.
//!
//! A check is answered when the backup comes to it in the order of the log, so that a difference is a real one however
//! much is on its way. Only units that differ are sent (or, where most do, all: a check would read them twice).

use std::collections::HashMap;

use bytes::Bytes;

use super::{Action, Owner, SessionError, Source};
use crate::mirror::core::extent::Extent;
use crate::mirror::core::range_locks::Ticket;
use crate::mirror::core::record::{Payload, Record, digest};

/// Names a unit that is being read or checked.
pub type UnitId = u64;

/// Units under way at once. Bounds memory: each is at most [`super::super::extent::UNIT`] bytes.
const WINDOW: usize = 8;
/// From this many differences (matches count twice against them) units are sent without a check.
const DIFFER: u32 = 4;
/// Every so often one is checked nevertheless.
const PROBE: u64 = 8;

/// How far synchronisation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanProgress {
    /// Regions to go.
    pub left: u32,
    /// Regions in all, in this session.
    pub total: u32,
    /// Bytes that were sent because they differed, or without asking.
    pub copied: u64,
    /// A local read error has stopped it, here. It starts again with the next session.
    pub stuck: Option<Extent>,
}

/// What a verify job found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyResult {
    /// Bytes that were compared.
    pub bytes: u64,
    /// Bytes in units that differed. They are marked, and synchronised.
    pub differing: u64,
    /// It was aborted, or the session broke, or a read failed: not everything was compared.
    pub incomplete: bool,
}

#[derive(Debug)]
struct Unit {
    extent: Extent,
    region: u32,
    /// The pass over its region that it belongs to.
    pass: u64,
    verify: bool,
    copy: bool,
    ticket: Option<Ticket>,
    /// Of a session that is over: only its lock is still to be given back.
    stale: bool,
}

#[derive(Debug, Default)]
struct Walk {
    next_region: u32,
    /// Of the current region, last first.
    units: Vec<(u32, Extent)>,
}

#[derive(Debug)]
struct Verify {
    walk: Walk,
    under_way: u32,
    ending: bool,
    result: VerifyResult,
}

#[derive(Debug, Default)]
pub(super) struct Scans {
    next_unit: UnitId,
    units: HashMap<UnitId, Unit>,
    sync: Walk,
    /// Passes over regions begun so far.
    passes: u64,
    /// Of the regions being synchronised: the newest pass, and its units to go.
    left: HashMap<u32, (u64, u32)>,
    differ: u32,
    progress: ScanProgress,
    verify: Option<Verify>,
}

impl Scans {
    pub(super) fn start(&mut self, total: u32) {
        self.sync = Walk::default();
        self.left.clear();
        self.differ = 0;
        self.progress = ScanProgress { left: total, total, copied: 0, stuck: None };
    }
}

impl Source {
    /// Gives out reads while there is something to synchronise or verify and the guest's own writes leave room.
    pub(super) fn pump(&mut self) {
        while self.scans.units.len() < WINDOW && self.session.as_ref().is_some_and(|s| !s.is_pressed()) {
            let Some((region, extent, verify)) = self.next_unit() else { break };
            let unit = self.scans.next_unit;
            self.scans.next_unit += 1;
            let copy = !verify && self.scans.differ >= DIFFER && !unit.is_multiple_of(PROBE);
            let pass = self.scans.left.get(&region).map_or(0, |(pass, _)| *pass);
            self.scans.units.insert(unit, Unit { extent, region, pass, verify, copy, ticket: None, stale: false });
            self.lock_unit(unit);
        }
        if self.scans.units.is_empty() {
            self.announce_sync();
        }
    }

    fn next_unit(&mut self) -> Option<(u32, Extent, bool)> {
        if self.scans.sync.units.is_empty() && self.scans.progress.stuck.is_none() {
            let from = self.scans.sync.next_region;
            if let Some(region) = self.marks.next_unsent(from).or_else(|| self.marks.next_unsent(0)) {
                self.marks.begin_sync(region);
                let mut units: Vec<_> = self.geometry.units_of(region).map(|unit| (region, unit)).collect();
                units.reverse();
                self.scans.passes += 1;
                self.scans.left.insert(region, (self.scans.passes, units.len() as u32));
                self.scans.sync = Walk { next_region: region + 1, units };
            }
        }
        if let Some((region, extent)) = self.scans.sync.units.pop() {
            return Some((region, extent, false));
        }
        // A SyncDone must not follow a check that is not answered yet, nor share a batch with one: it would hide it.
        if !self.is_in_sync() {
            return None;
        }
        let regions = self.geometry.regions();
        let verify = self.scans.verify.as_mut().filter(|v| !v.ending)?;
        if verify.walk.units.is_empty() && verify.walk.next_region < regions {
            let region = verify.walk.next_region;
            verify.walk.next_region += 1;
            verify.walk.units = self.geometry.units_of(region).map(|unit| (region, unit)).collect();
            verify.walk.units.reverse();
        }
        let (region, extent) = verify.walk.units.pop()?;
        verify.under_way += 1;
        Some((region, extent, true))
    }

    fn lock_unit(&mut self, id: UnitId) {
        let Some(unit) = self.scans.units.get_mut(&id) else { return };
        let (ticket, granted) = self.locks.acquire(unit.extent);
        unit.ticket = Some(ticket);
        self.owners.insert(ticket, Owner::Unit(id));
        if granted {
            self.locked(ticket);
        }
    }

    pub(super) fn unit_locked(&mut self, id: UnitId) {
        if let Some(unit) = self.scans.units.get(&id) {
            self.actions.push(Action::Read { unit: id, extent: unit.extent });
        }
    }

    /// A read is over.
    pub fn unit_read(&mut self, id: UnitId, result: Result<Bytes, ()>) {
        let Some(unit) = self.scans.units.get_mut(&id) else { return };
        let (extent, region, verify, ticket) = (unit.extent, unit.region, unit.verify, unit.ticket.take());
        let Some(session) = self.session.as_mut().filter(|_| !unit.stale) else {
            self.scans.units.remove(&id);
            ticket.into_iter().for_each(|t| self.unlock(t));
            self.pump();
            return;
        };
        if verify && self.marks.is_unsynced(region) {
            // Marked while it waited for its lock: a difference that is known is no finding, and must not make the copy
            // unfit. Once it is synchronised it is compared after all.
            self.scans.units.remove(&id);
            if let Some(verify) = &mut self.scans.verify {
                verify.under_way -= 1;
                verify.walk.units.push((region, extent));
            }
            ticket.into_iter().for_each(|t| self.unlock(t));
            self.verify_over();
            self.pump();
            return;
        }
        let mut over = false;
        match result {
            Ok(data) if unit.copy => {
                self.scans.progress.copied += data.len() as u64;
                let payload = if data.iter().all(|b| *b == 0) { Payload::Zeroes } else { Payload::Data(data) };
                session.append_own(Record::Write { extent, payload });
                over = true;
            }
            Ok(data) => {
                session.append_own(Record::Check { id, extent, digest: digest(&data), verify });
            }
            Err(()) if verify => {
                if let Some(verify) = &mut self.scans.verify {
                    verify.result.incomplete = true;
                }
                over = true;
            }
            Err(()) => {
                self.scans.progress.stuck = Some(extent);
                self.scans.units.remove(&id);
            }
        }
        self.actions.push(Action::Send);
        // Only after the record is in the log: whoever writes this range next comes behind it.
        ticket.into_iter().for_each(|t| self.unlock(t));
        if over {
            self.unit_over(id);
        }
        self.pump();
    }

    /// The backup's answer to a check.
    pub fn check_result(&mut self, id: UnitId, same: bool) {
        let Some(unit) = self.scans.units.get_mut(&id).filter(|u| u.ticket.is_none()) else { return };
        let (verify, region, length) = (unit.verify, unit.region, u64::from(unit.extent.length));
        if verify {
            if let Some(verify) = &mut self.scans.verify {
                verify.result.bytes += length;
                verify.result.differing += if same { 0 } else { length };
            }
            if !same {
                self.differs(region);
            }
            self.unit_over(id);
        } else if same {
            self.scans.differ = self.scans.differ.saturating_sub(2);
            self.unit_over(id);
        } else {
            self.scans.differ = (self.scans.differ + 1).min(DIFFER + 2);
            unit.copy = true;
            self.lock_unit(id);
        }
        self.pump();
    }

    fn unit_over(&mut self, id: UnitId) {
        let Some(unit) = self.scans.units.remove(&id) else { return };
        if unit.verify {
            if let Some(verify) = &mut self.scans.verify {
                verify.under_way -= 1;
            }
            self.verify_over();
            return;
        }
        // A region that was marked anew is gone over anew: the end of an older pass says nothing about the newest.
        let Some((_, left)) = self.scans.left.get_mut(&unit.region).filter(|(pass, _)| *pass == unit.pass) else {
            return;
        };
        *left -= 1;
        if *left == 0 {
            self.scans.left.remove(&unit.region);
            if let Some(session) = &self.session {
                let (batch, durable) = (session.last_used(), session.durable);
                self.marks.end_sync(unit.region, batch);
                if batch <= durable {
                    // All that was checked was alike, and is on the backup's disk for good already.
                    self.durable(durable);
                }
            }
        }
    }

    fn verify_over(&mut self) {
        let regions = self.geometry.regions();
        let done = self.scans.verify.take_if(|v| {
            let all = v.walk.units.is_empty() && v.walk.next_region >= regions;
            v.under_way == 0 && (all || v.ending)
        });
        if let Some(mut verify) = done {
            let all = verify.walk.units.is_empty() && verify.walk.next_region >= regions;
            verify.result.incomplete |= !all;
            self.actions.push(Action::Verified(verify.result));
        }
    }

    /// Compares both copies, the guest running. Ends with [`Action::Verified`].
    ///
    /// # Errors
    /// Without a session, while the copies are known to differ, or while one is running.
    pub fn start_verify(&mut self) -> Result<(), SessionError> {
        if self.session.is_none() {
            return Err(SessionError::NotConnected);
        }
        if !self.is_in_sync() {
            return Err(SessionError::NotInSync(self.marks.unsynced()));
        }
        if self.scans.verify.is_some() {
            return Err(SessionError::Busy);
        }
        let result = VerifyResult { bytes: 0, differing: 0, incomplete: false };
        self.scans.verify = Some(Verify { walk: Walk::default(), under_way: 0, ending: false, result });
        self.pump();
        Ok(())
    }

    /// Asks a verify job to end. It has ended when [`Action::Verified`] says so. `false` if none runs.
    pub fn abort_verify(&mut self) -> bool {
        let Some(verify) = &mut self.scans.verify else { return false };
        verify.ending = true;
        self.verify_over();
        true
    }

    /// What a running verify job has found so far.
    #[must_use]
    pub fn verify_progress(&self) -> Option<VerifyResult> {
        self.scans.verify.as_ref().map(|v| v.result)
    }

    pub(super) fn stop_scans(&mut self) {
        self.scans.units.retain(|_, unit| unit.ticket.is_some());
        self.scans.units.values_mut().for_each(|unit| unit.stale = true);
        self.scans.start(0);
        if let Some(verify) = self.scans.verify.take() {
            let result = VerifyResult { incomplete: true, ..verify.result };
            self.actions.push(Action::Verified(result));
        }
    }

    /// How far synchronisation is.
    #[must_use]
    pub fn sync_progress(&self) -> ScanProgress {
        ScanProgress { left: self.marks.unsynced(), ..self.scans.progress }
    }
}
