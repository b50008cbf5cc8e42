//! The side that follows: holds batches, applies whole ones in order, and becomes exactly one epoch when activated.
//!
//! Without input and output, like [`super::source`]. One machine per session with a source. What of it survives a crash
//! is the head ([`super::meta::Head`]): `applying` is on disk before the first write of a batch and goes only after a
//! flush with nothing half done, so an unclean end is never taken for a good copy (hazard F15).

mod words;

use std::collections::{BTreeMap, VecDeque};

use super::extent::Geometry;
use super::record::{BatchDigest, BatchEnd, Payload, Record};
use super::spill::{Incoming, Place, Room, Segment, Spill, Stored, share};
pub use words::{Checked, EpochError, HeadState, Reply, TargetAction, TargetError, TargetProgress, range_of};

/// Flush at the latest after so many applied bytes.
const FLUSH_BYTES: u64 = 64 << 20;
/// One write of the largest size may go over the capacity.
const SLACK: u64 = 64 << 20;

#[derive(Debug)]
struct Staged {
    end: BatchEnd,
    /// Not given out yet.
    segments: VecDeque<Segment>,
    cost: u64,
    begun: bool,
    sync_done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Busy {
    Idle,
    Saving(HeadState),
    /// With what it gives back.
    Applying(u64, Option<Place>),
    Flushing(u64),
}

/// The target of one disk, in one session.
pub struct Target {
    geometry: Geometry,
    room: Room,
    open: Incoming,
    digest: BatchDigest,
    open_cost: u64,
    open_sync_done: bool,
    /// Comes with what is being written to the journal.
    ending: Option<BatchEnd>,
    held: u64,
    staged: VecDeque<Staged>,
    last_batch: u64,
    /// Epochs that are whole here, with their batch and whether they were armed; the last one that is applied stays.
    epochs: BTreeMap<u64, (u64, bool)>,
    armed: bool,
    /// Batches up to this one may be applied.
    commit: u64,
    applied: u64,
    durable: u64,
    unflushed: u64,
    busy: Busy,
    /// As on disk.
    head: HeadState,
    synced: bool,
    frozen: bool,
    activating: Option<u64>,
    active: bool,
    broken: Option<&'static str>,
    actions: Vec<TargetAction>,
}

impl Target {
    /// A target whose head on disk is `head`. `memory` bytes may be held.
    #[must_use]
    pub fn new(geometry: Geometry, memory: u64, head: HeadState) -> Self {
        Self::with_journal(geometry, memory, 0, head)
    }

    /// The same with a journal of `journal` bytes for what is beyond `memory`.
    #[must_use]
    pub fn with_journal(geometry: Geometry, memory: u64, journal: u64, head: HeadState) -> Self {
        let room = Room::new(memory, journal);
        Self {
            geometry,
            open: room.begin(),
            room,
            digest: BatchDigest::default(),
            open_cost: 0,
            open_sync_done: false,
            ending: None,
            held: 0,
            staged: VecDeque::new(),
            last_batch: 0,
            epochs: BTreeMap::new(),
            armed: false,
            commit: 0,
            applied: 0,
            durable: 0,
            unflushed: 0,
            busy: Busy::Idle,
            head,
            synced: head.synced,
            frozen: false,
            activating: None,
            active: false,
            broken: None,
            actions: Vec::new(),
        }
    }

    /// What to do, in this order, since the last call.
    #[must_use]
    pub fn take_actions(&mut self) -> Vec<TargetAction> {
        std::mem::take(&mut self.actions)
    }

    /// The next record of the stream. What is returned has to be written to the journal, and [`Target::spilled`] called,
    /// before the next one. If that fails, end the session: nothing counts as held that is in neither place.
    ///
    /// # Errors
    /// [`TargetError`]: end the session.
    pub fn receive(&mut self, record: Record) -> Result<Option<Spill>, TargetError> {
        if self.frozen {
            return Err(TargetError::Frozen);
        }
        if self.open.is_writing() {
            return Err(TargetError::NotSpilled);
        }
        match &record {
            Record::Write { extent, payload } => {
                self.geometry.check(*extent)?;
                if let Payload::Data(data) = payload
                    && data.len() != extent.length as usize
                {
                    return Err(TargetError::Length { data: data.len(), length: extent.length });
                }
            }
            Record::Check { extent, .. } => self.geometry.check(*extent)?,
            Record::SyncDone => {}
            Record::End(end) => return self.end(*end),
        }
        let (cost, capacity) = (record.cost(), self.room.capacity());
        // With a journal that has no room, the source has less of both than it was told.
        let memory =
            self.room.in_memory() + cost > capacity.saturating_sub(self.room.in_journal()).saturating_add(SLACK);
        if memory || self.held + cost > capacity.saturating_add(SLACK) {
            return Err(TargetError::Capacity(capacity));
        }
        self.held += cost;
        self.open_cost += cost;
        self.open_sync_done |= record == Record::SyncDone;
        self.digest.update(&record);
        Ok(self.open.push(&mut self.room, record))
    }

    /// What [`Target::receive`] returned is in the journal.
    pub fn spilled(&mut self, stored: Stored) {
        self.open.written(&mut self.room, stored);
        if let Some(end) = self.ending.take() {
            self.stage(end);
        }
    }

    fn end(&mut self, end: BatchEnd) -> Result<Option<Spill>, TargetError> {
        let expected = self.last_batch + 1;
        if end.batch != expected {
            return Err(TargetError::Order { expected, got: end.batch });
        }
        if self.digest.end(end.batch, end.epoch, end.armed) != end {
            return Err(TargetError::Digest(end.batch));
        }
        let spill = self.open.close(&mut self.room);
        match spill {
            Some(_) => self.ending = Some(end),
            None => self.stage(end),
        }
        Ok(spill)
    }

    fn stage(&mut self, end: BatchEnd) {
        self.last_batch = end.batch;
        let segments = std::mem::replace(&mut self.open, self.room.begin()).into_segments();
        let (cost, sync_done) = (std::mem::take(&mut self.open_cost), std::mem::take(&mut self.open_sync_done));
        self.staged.push_back(Staged { end, segments, cost, begun: false, sync_done });
        if let Some(epoch) = end.epoch {
            self.epochs.insert(epoch, (end.batch, end.armed));
            self.actions.push(TargetAction::Held(epoch));
        }
        self.armed |= end.armed;
        if !self.armed {
            self.commit = end.batch;
        }
        self.step();
    }

    /// The stream has ended. What is whole stays.
    pub fn session_over(&mut self) {
        self.held -= std::mem::take(&mut self.open_cost);
        self.open_sync_done = false;
        self.ending = None;
        self.room.drop_incoming(&self.open);
        self.open = self.room.begin();
        self.digest = BatchDigest::default();
    }

    /// Whether all of the epoch has arrived.
    #[must_use]
    pub fn holds(&self, epoch: u64) -> bool {
        self.epochs.contains_key(&epoch)
    }

    /// The epoch is acknowledged, so the memory never goes back before it: it may be applied, and those before it.
    ///
    /// # Errors
    /// [`EpochError::NotHeld`], [`EpochError::Broken`].
    pub fn commit(&mut self, epoch: u64) -> Result<(), EpochError> {
        if let Some(why) = self.broken {
            return Err(EpochError::Broken(why));
        }
        let (batch, _) = *self.epochs.get(&epoch).ok_or(EpochError::NotHeld(epoch))?;
        self.commit = self.commit.max(batch);
        self.step();
        Ok(())
    }

    /// The copy of the guest is gone or was never made: what is whole may be applied as it comes.
    pub fn disarm(&mut self) {
        if self.activating.is_none() {
            self.armed = false;
            self.commit = self.last_batch;
            self.step();
        }
    }

    /// Takes in nothing more. The first step of claiming: commits end, too, with what the caller has committed.
    pub fn freeze(&mut self) {
        self.frozen = true;
        self.session_over();
    }

    /// Makes the disk exactly that of `epoch`: older batches are applied, newer ones dropped, then flushed.
    /// [`TargetAction::Activated`] says when it is done. Freezes.
    ///
    /// # Errors
    /// [`EpochError`], with nothing changed but the freeze.
    pub fn activate(&mut self, epoch: u64) -> Result<(), EpochError> {
        self.freeze();
        if let Some(why) = self.broken {
            return Err(EpochError::Broken(why));
        }
        let Some(&(batch, armed)) = self.epochs.get(&epoch) else {
            return Err(if self.armed { EpochError::NotHeld(epoch) } else { EpochError::NotArmed });
        };
        if !self.armed || !armed {
            return Err(EpochError::NotArmed);
        }
        // What is being applied counts as applied.
        if self.applied > batch || self.commit > batch {
            return Err(EpochError::Ahead(epoch));
        }
        let ends_sync = |s: &&Staged| s.end.batch <= batch && s.sync_done;
        if !self.synced && !self.staged.iter().any(|s| ends_sync(&s)) {
            return Err(EpochError::NotSynced);
        }
        self.staged.retain(|s| s.end.batch <= batch);
        self.commit = batch;
        self.activating = Some(epoch);
        self.step();
        Ok(())
    }

    /// Nothing has come for a while: the head may say that the copy is good as it is.
    pub fn settle(&mut self) {
        if self.busy == Busy::Idle && self.broken.is_none() && !self.is_behind() && self.activating.is_none() {
            self.save(HeadState { synced: self.synced, applying: false, epoch: self.at_epoch(), source: false });
        }
    }

    fn at_epoch(&self) -> Option<u64> {
        self.epochs.iter().find(|(_, (batch, _))| *batch == self.applied).map(|(epoch, _)| *epoch)
    }

    fn is_behind(&self) -> bool {
        self.staged.front().is_some_and(|s| s.end.batch <= self.commit) || self.applied > self.durable
    }

    fn save(&mut self, state: HeadState) {
        if state != self.head {
            self.busy = Busy::Saving(state);
            self.actions.push(TargetAction::SaveHead(state));
        }
    }

    fn step(&mut self) {
        if self.busy != Busy::Idle || self.broken.is_some() || self.active {
            return;
        }
        if self.head.synced && !self.synced {
            let state = HeadState { synced: false, epoch: None, ..self.head };
            return self.save(state);
        }
        let front = self.staged.front_mut().filter(|s| s.end.batch <= self.commit);
        let (ready, begun) = (front.is_some(), front.as_ref().is_some_and(|s| s.begun));
        if ready && !self.head.applying {
            self.save(HeadState { synced: self.head.synced, applying: true, epoch: None, source: false });
        } else if let Some(front) = front.filter(|_| begun || self.unflushed < FLUSH_BYTES) {
            front.begun = true;
            let segment = front.segments.pop_front().unwrap_or(Segment::Memory(Vec::new(), 0));
            let (memory, place) = share(&segment);
            self.busy = Busy::Applying(memory, place);
            self.actions.push(match segment {
                Segment::Memory(records, _) => TargetAction::Apply(records),
                Segment::Journal(chunk) => TargetAction::ApplySpilled(chunk),
            });
        } else if self.applied > self.durable {
            self.busy = Busy::Flushing(self.applied);
            self.actions.push(TargetAction::Flush);
        } else if let Some(epoch) = self.activating {
            if self.synced {
                self.save(HeadState { synced: true, applying: false, epoch: Some(epoch), source: true });
            } else {
                self.fail("a check of its contents failed, or the synchronisation is unfinished");
            }
        }
    }

    /// The head is on disk, or not.
    pub fn saved(&mut self, ok: bool) {
        let Busy::Saving(state) = self.busy else { return };
        self.busy = Busy::Idle;
        if !ok {
            return self.fail("its metadata cannot be written");
        }
        self.head = state;
        if let (true, Some(epoch)) = (state.source, self.activating) {
            self.active = true;
            self.actions.push(TargetAction::Activated(epoch));
        }
        self.step();
    }

    /// The records of the last `Apply` or `ApplySpilled` are done; with the answers to its checks. `Err`: a read or write
    /// failed.
    pub fn applied(&mut self, result: Result<Vec<Checked>, ()>) {
        let Busy::Applying(memory, place) = self.busy else { return };
        self.busy = Busy::Idle;
        let Ok(checks) = result else {
            let journal = "a write to it failed, or the journal did not give back what it was given";
            return self.fail(if place.is_some() { journal } else { "a write to it failed" });
        };
        self.room.give_back(memory, place);
        for Checked { id, same, verify } in checks {
            self.synced &= same || !verify;
            self.actions.push(TargetAction::Reply(Reply::Checked { id, same }));
        }
        let Some(done) = self.staged.pop_front_if(|front| front.segments.is_empty()) else { return self.step() };
        self.held -= done.cost;
        self.unflushed += done.cost;
        self.applied = done.end.batch;
        let newest = self.at_epoch();
        self.epochs.retain(|epoch, (batch, _)| *batch > done.end.batch || Some(*epoch) == newest);
        self.synced |= done.sync_done;
        self.actions.push(TargetAction::Reply(Reply::Applied(self.applied)));
        self.step();
    }

    /// The flush is over.
    pub fn flushed(&mut self, ok: bool) {
        let Busy::Flushing(batch) = self.busy else { return };
        self.busy = Busy::Idle;
        if !ok {
            // What of the earlier writes is on disk is unknown, and a second flush would not say.
            return self.fail("a flush of it failed");
        }
        self.durable = batch;
        self.unflushed = 0;
        self.actions.push(TargetAction::Reply(Reply::Durable(batch)));
        self.step();
    }

    fn fail(&mut self, why: &'static str) {
        self.broken = Some(why);
        self.actions.push(TargetAction::Broken(why));
    }

    /// Whether nothing is being done: the machine may be dropped without losing more than what it holds.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.busy == Busy::Idle
    }

    /// Whether batches wait for commits.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// Whether the copy was alike when it was last known.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Bytes held, and batches received, applied and durable.
    #[must_use]
    pub fn progress(&self) -> TargetProgress {
        TargetProgress {
            held: self.held,
            in_memory: self.room.in_memory(),
            in_journal: self.room.in_journal(),
            received: self.last_batch,
            applied: self.applied,
            durable: self.durable,
            newest_epoch: self.epochs.last_key_value().map(|(epoch, _)| *epoch),
        }
    }
}
