//! The side that the guest writes: orders its writes, logs them into batches, keeps the marks, and synchronises.
//!
//! Without input and output: the caller carries out [`Action`]s and reports what came of them. The steps of one write:
//!
//! ```text
//! submit ─► admitted (back-pressure) ─► range locked ─► region's mark on disk ─► Write ─► written
//!        ─► logged in the open batch, region stamped ─► lock released ─► Done
//! ```
//!
//! It is in the log before its completion is reported (hazard F12b), and completion waits neither for the peer nor for a
//! checkpoint.

mod scan;
mod session;

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::extent::{Extent, Geometry};
use super::intent::Intent;
use super::marks::Marks;
use super::meta::PageImage;
use super::range_locks::{RangeLocks, Ticket};
use super::record::{Payload, Record};
use super::throttle::{Admission, Millis};
pub use scan::{ScanProgress, VerifyResult};
use scan::{Scans, UnitId};
use session::Session;
pub use session::{Lost, SessionError, SessionLimits};

/// Names one write of the guest. The caller's choice; unique among those under way.
pub type WriteId = u64;

/// What the caller has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write this page of marks to stable storage and call [`Source::persisted`].
    Persist(PageImage),
    /// Write this to the local disk and call [`Source::written`].
    Write(WriteId),
    /// Tell the guest: it is done.
    Done(WriteId),
    /// Tell the guest: I/O error.
    Failed(WriteId),
    /// Read this from the local disk and call [`Source::unit_read`].
    Read {
        /// Names the read.
        unit: UnitId,
        /// What to read.
        extent: Extent,
    },
    /// Flush the local disk and call [`Source::flushed`].
    Flush,
    /// There are records in [`Source::next_record`].
    Send,
    /// The open armed batch grows large: a checkpoint should come early. Said once per batch.
    CutWanted,
    /// The session has ended from this side.
    Lost(Lost),
    /// The copies were alike and are not any more.
    OutOfSync,
    /// A verify job has ended.
    Verified(VerifyResult),
}

#[derive(Debug)]
struct Writing {
    extent: Extent,
    /// What it counts for; 0 when it was let in without a session.
    counted: u64,
    cost: u64,
    ticket: Option<Ticket>,
}

#[derive(Debug, Clone, Copy)]
enum Owner {
    Write(WriteId),
    Unit(UnitId),
}

/// The source of one disk.
pub struct Source {
    geometry: Geometry,
    locks: RangeLocks,
    owners: HashMap<Ticket, Owner>,
    marks: Marks,
    intent: Intent,
    /// Clean regions whose marks are still on disk.
    retiring: BTreeSet<u32>,
    /// Those of them that a flush under way covers.
    flushing: BTreeSet<u32>,
    writes: HashMap<WriteId, Writing>,
    /// Regions with writes under way, and how many.
    pins: HashMap<u32, u32>,
    /// Locked, and waiting for marks to be on disk.
    unmarked: Vec<WriteId>,
    /// Held back, since the time, in order.
    waiting: VecDeque<(Millis, WriteId)>,
    /// When the first of them may go on, if time is what it waits for.
    next_at: Option<Millis>,
    session: Option<Session>,
    scans: Scans,
    actions: Vec<Action>,
}

impl Source {
    /// A source with the marks that the log on disk has.
    #[must_use]
    pub fn new(geometry: Geometry, intent: Intent) -> Self {
        let mut marks = Marks::new(geometry.regions());
        for region in intent.marked(geometry.regions()) {
            marks.set_unsent(region);
        }
        Self {
            geometry,
            locks: RangeLocks::default(),
            owners: HashMap::new(),
            marks,
            intent,
            retiring: BTreeSet::new(),
            flushing: BTreeSet::new(),
            writes: HashMap::new(),
            pins: HashMap::new(),
            unmarked: Vec::new(),
            waiting: VecDeque::new(),
            next_at: None,
            session: None,
            scans: Scans::default(),
            actions: Vec::new(),
        }
    }

    /// What to do, in this order, since the last call.
    #[must_use]
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// A write of the guest. `data` is whether it carries contents or writes zeroes; `extent` must have passed
    /// [`Geometry::check`].
    pub fn submit(&mut self, now: Millis, id: WriteId, extent: Extent, data: bool) {
        let record = if data { u64::from(extent.length) } else { 0 };
        let cost = Record::SyncDone.cost() + record;
        self.writes.insert(id, Writing { extent, counted: 0, cost, ticket: None });
        self.waiting.push_back((now, id));
        if self.waiting.len() == 1 {
            self.admit_waiting(now);
        }
    }

    /// Lets on whoever need not wait any longer.
    fn admit_waiting(&mut self, now: Millis) {
        self.next_at = None;
        while let Some(&(_, id)) = self.waiting.front() {
            if let (Some(write), Some(session)) = (self.writes.get_mut(&id), &mut self.session) {
                match session.admit(now, write.cost) {
                    Admission::Now => write.counted = write.cost,
                    Admission::At(at) => {
                        self.next_at = Some(at);
                        break;
                    }
                    Admission::Full => break,
                }
            }
            self.waiting.pop_front();
            self.lock(id);
        }
        self.ask_for_cut();
    }

    /// When the write that waits longest has waited too long: without the backup applying anything, or altogether.
    fn patience_ends(&self) -> Option<Millis> {
        let session = self.session.as_ref()?;
        let (since, _) = *self.waiting.front()?;
        let patience = session.limits.patience;
        Some((since.max(session.progressed_at()) + patience).min(since + 3 * patience))
    }

    fn lock(&mut self, id: WriteId) {
        let Some(write) = self.writes.get_mut(&id) else { return };
        let (ticket, granted) = self.locks.acquire(write.extent);
        write.ticket = Some(ticket);
        self.owners.insert(ticket, Owner::Write(id));
        if granted {
            self.locked(ticket);
        }
    }

    fn locked(&mut self, ticket: Ticket) {
        match self.owners.get(&ticket) {
            Some(&Owner::Write(id)) => {
                let extent = self.writes[&id].extent;
                for region in self.geometry.regions_of(extent) {
                    *self.pins.entry(region).or_default() += 1;
                    self.want(region);
                }
                if self.is_marked(extent) {
                    self.actions.push(Action::Write(id));
                } else {
                    self.unmarked.push(id);
                }
            }
            Some(&Owner::Unit(unit)) => self.unit_locked(unit),
            None => {}
        }
    }

    fn is_marked(&self, extent: Extent) -> bool {
        self.geometry.regions_of(extent).all(|region| self.intent.is_ready(region))
    }

    fn unlock(&mut self, ticket: Ticket) {
        self.owners.remove(&ticket);
        for granted in self.locks.release(ticket) {
            self.locked(granted);
        }
    }

    /// The write of a page of marks is over. Guest writes that needed it go on, or fail with it.
    pub fn persisted(&mut self, page: u32, ok: bool) {
        let next = self.intent.persisted(page, ok);
        self.actions.extend(next.map(Action::Persist));
        let waiting = std::mem::take(&mut self.unmarked);
        let (ready, not): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|id| self.is_marked(self.writes[id].extent));
        self.actions.extend(ready.into_iter().map(Action::Write));
        if ok {
            self.unmarked = not;
            return;
        }
        // A write whose mark cannot be kept must not happen: after a crash nobody would know of it. Writes that wait for
        // another page fail with it; a disk that loses metadata writes is no place for more of them.
        for id in not {
            self.finish(id, None);
        }
    }

    /// The local write is over; on success with what it wrote.
    pub fn written(&mut self, id: WriteId, result: Result<Payload, ()>) {
        let Some(extent) = self.writes.get(&id).map(|w| w.extent) else { return };
        match result {
            Ok(payload) => {
                self.finish(id, Some(payload));
            }
            Err(()) => {
                // What is on the disk now is anything between old and new: it has to be read and sent (F17). The copy
                // stays fit for activation meanwhile: old contents are a right outcome of a write that failed.
                self.mark(self.geometry.regions_of(extent));
                self.finish(id, None);
            }
        }
        self.pump();
    }

    fn finish(&mut self, id: WriteId, payload: Option<Payload>) {
        let Some(write) = self.writes.remove(&id) else { return };
        let done = payload.is_some();
        match payload {
            Some(payload) => {
                if let (Some(session), 0) = (&mut self.session, write.counted) {
                    session.count(write.cost);
                }
                self.log(write.extent, payload);
            }
            None => {
                if let Some(session) = &mut self.session {
                    session.forget(write.counted);
                }
            }
        }
        for region in self.geometry.regions_of(write.extent) {
            if let Some(count) = self.pins.get_mut(&region) {
                *count -= 1;
                if *count == 0 {
                    self.pins.remove(&region);
                }
            }
        }
        self.actions.push(if done { Action::Done(id) } else { Action::Failed(id) });
        if let Some(ticket) = write.ticket {
            self.unlock(ticket);
        }
    }

    /// Into the open batch, or without a session only into the marks.
    fn log(&mut self, extent: Extent, payload: Payload) {
        let regions = self.geometry.regions_of(extent);
        match &mut self.session {
            Some(session) => {
                let batch = session.append(Record::Write { extent, payload });
                regions.for_each(|region| self.marks.touch(region, batch));
                self.actions.push(Action::Send);
                self.ask_for_cut();
            }
            None => regions.for_each(|region| self.marks.set_unsent(region)),
        }
    }

    /// The caller's clock. Call when [`Source::wake_at`] says so, or more often.
    pub fn tick(&mut self, now: Millis) {
        if self.patience_ends().is_some_and(|at| at <= now) {
            self.end_session(Some(Lost::Overflow));
        }
        self.admit_waiting(now);
        if let Some(session) = &mut self.session
            && session.cut_by_age(now)
        {
            self.actions.push(Action::Send);
        }
        self.pump();
    }

    fn want(&mut self, region: u32) {
        self.retiring.remove(&region);
        self.flushing.remove(&region);
        let image = self.intent.want(region);
        self.actions.extend(image.map(Action::Persist));
    }

    /// Begins to take away the marks of clean regions. Call now and then, seconds apart.
    ///
    /// That the backup has a write for good is not enough: this host's disk may still have it in a volatile cache, and
    /// come back from a power loss without it. So a flush comes first.
    pub fn tidy(&mut self) {
        if !self.flushing.is_empty() {
            return;
        }
        if self.retiring.is_empty() {
            self.actions.extend(self.intent.tidy().into_iter().map(Action::Persist));
        } else {
            self.flushing = std::mem::take(&mut self.retiring);
            self.actions.push(Action::Flush);
        }
    }

    /// The flush is over.
    pub fn flushed(&mut self, ok: bool) {
        let covered = std::mem::take(&mut self.flushing);
        if ok {
            covered.into_iter().for_each(|region| self.intent.unwant(region));
            self.actions.extend(self.intent.tidy().into_iter().map(Action::Persist));
        } else {
            self.retiring.extend(covered);
        }
    }

    /// When [`Source::tick`] has something to do, if anything is known to come.
    #[must_use]
    pub fn wake_at(&self) -> Option<Millis> {
        let age = self.session.as_ref().and_then(Session::cut_at);
        [self.next_at, self.patience_ends(), age].into_iter().flatten().min()
    }

    /// Whether no write of the guest is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.writes.is_empty()
    }

    /// Regions that differ or may differ.
    #[must_use]
    pub fn dirty_regions(&self) -> u32 {
        self.marks.dirty()
    }

    /// Regions that would have to be compared after a crash now.
    #[must_use]
    pub fn marked_regions(&self) -> u32 {
        self.intent.count() as u32
    }

    /// Writes that are held back now.
    #[must_use]
    pub fn throttled(&self) -> usize {
        self.waiting.len()
    }

    /// The disk's.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
}
