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

use std::collections::{HashMap, VecDeque};

use super::extent::{Extent, Geometry};
use super::intent::Intent;
use super::marks::Marks;
use super::meta::PageImage;
use super::range_locks::{RangeLocks, Ticket};
use super::record::{Payload, Record};
use super::throttle::{Admission, Millis};
use scan::{Scans, UnitId};
pub use scan::{ScanProgress, VerifyResult};
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
    writes: HashMap<WriteId, Writing>,
    /// Regions with writes under way, and how many.
    pins: HashMap<u32, u32>,
    /// Locked, and waiting for marks to be on disk.
    unmarked: Vec<WriteId>,
    /// Paced until the time.
    paced: VecDeque<(Millis, WriteId)>,
    /// Waiting since the time for the backup to apply something.
    full: VecDeque<(Millis, WriteId)>,
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
            writes: HashMap::new(),
            pins: HashMap::new(),
            unmarked: Vec::new(),
            paced: VecDeque::new(),
            full: VecDeque::new(),
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
        if self.full.is_empty() {
            self.admit(now, now, id);
        } else {
            self.full.push_back((now, id));
        }
    }

    /// `false` if it has to wait longer.
    fn admit(&mut self, now: Millis, since: Millis, id: WriteId) -> bool {
        let Some(write) = self.writes.get_mut(&id) else { return true };
        let admission = match &mut self.session {
            Some(session) => session.throttle.admit(now, write.cost),
            None => Admission::Now,
        };
        if self.session.is_some() && admission != Admission::Full {
            write.counted = write.cost;
        }
        match admission {
            Admission::Now => self.lock(id),
            Admission::At(at) => self.paced.push_back((at, id)),
            Admission::Full => {
                self.full.push_front((since, id));
                self.ask_for_cut();
                return false;
            }
        }
        self.ask_for_cut();
        true
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
                    let image = self.intent.want(region);
                    self.actions.extend(image.map(Action::Persist));
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
                    session.throttle.add(write.cost);
                }
                self.log(write.extent, payload);
            }
            None => {
                if let Some(session) = &mut self.session {
                    session.throttle.forget(write.counted);
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
        while let Some(&(at, id)) = self.paced.front() {
            if at > now {
                break;
            }
            self.paced.pop_front();
            self.lock(id);
        }
        while let Some((since, id)) = self.full.pop_front() {
            let patience = self.session.as_ref().map_or(0, |s| s.limits.patience);
            if self.session.is_some() && now.saturating_sub(since) >= patience {
                self.full.push_front((since, id));
                self.end_session(Some(Lost::Overflow));
            } else if !self.admit(now, since, id) {
                break;
            }
        }
        if let Some(session) = &mut self.session
            && session.cut_by_age(now)
        {
            self.actions.push(Action::Send);
        }
        self.pump();
    }

    /// Marks that may go. Call now and then, seconds apart.
    pub fn tidy(&mut self) {
        self.actions.extend(self.intent.tidy().into_iter().map(Action::Persist));
    }

    /// When [`Source::tick`] has something to do, if anything is known to come.
    #[must_use]
    pub fn wake_at(&self) -> Option<Millis> {
        let paced = self.paced.front().map(|(at, _)| *at);
        let patience = self.session.as_ref().map_or(0, |s| s.limits.patience);
        let full = self.full.front().map(|(since, _)| since + patience);
        let age = self.session.as_ref().and_then(Session::cut_at);
        [paced, full, age].into_iter().flatten().min()
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

    /// Writes that are held back now.
    #[must_use]
    pub fn throttled(&self) -> usize {
        self.paced.len() + self.full.len()
    }

    /// The disk's.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
}
