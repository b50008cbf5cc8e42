//! The time with a peer: batches, barriers and watermarks.

use std::collections::VecDeque;

use super::{Action, Source};
use crate::mirror::core::record::{BatchDigest, BatchEnd, Record};
use crate::mirror::core::throttle::{Admission, Millis, Throttle};

/// What a session may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Bytes on their way above which writes are paced.
    pub soft: u64,
    /// Bytes on their way above which writes wait. At most what the peer can hold.
    pub hard: u64,
    /// Bytes not sent yet above which writes wait; they are paced from half of it on.
    pub queue: u64,
    /// Bytes on their way above which early checkpoints are asked for.
    pub early: u64,
    /// How long a write waits without anything being sent or applied, and a third of how long it waits altogether, before
    /// the session is given up, in milliseconds.
    pub patience: Millis,
    /// Size in bytes at which an unarmed batch is closed.
    pub cut_bytes: u64,
    /// Age in milliseconds at which an unarmed batch is closed.
    pub cut_age: Millis,
}

impl SessionLimits {
    /// For a peer that can hold `capacity` bytes, and as many here.
    #[must_use]
    pub fn for_capacity(capacity: u64) -> Self {
        Self::for_hosts(capacity, capacity)
    }

    /// For a peer that can hold `capacity` bytes, and `memory` bytes here. Early checkpoints are asked for while there is
    /// memory: what the peer has beyond is for the time until they come.
    #[must_use]
    pub fn for_hosts(capacity: u64, memory: u64) -> Self {
        let least = capacity.min(memory);
        Self {
            soft: capacity / 2,
            hard: capacity,
            queue: memory,
            early: least / 2,
            patience: 10_000,
            cut_bytes: (least / 8).min(8 << 20),
            cut_age: 50,
        }
    }
}

/// Why a session has ended from this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The backup did not keep up for longer than the guest may be held.
    Overflow,
}

/// An operation needs what is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// No peer.
    #[error("the disk has no connection to its copy; look at the other host's disk service")]
    NotConnected,
    /// The copies differ.
    #[error("the copies are not alike yet ({0} regions to go); wait for the synchronisation")]
    NotInSync(u32),
    /// One is running.
    #[error("a verify job is running already")]
    Busy,
    /// Batches would be applied as they come, and no epoch of them activated.
    #[error("the disk's session is not armed: it was connected anew since; protect the guest again")]
    NotArmed,
    /// The number does not grow.
    #[error("epoch {0} is not newer than the last one that was closed")]
    OldEpoch(u64),
}

pub(super) struct Session {
    pub(super) limits: SessionLimits,
    throttle: Throttle,
    /// What was not sent yet.
    unsent: Throttle,
    queue: VecDeque<Record>,
    /// The open batch.
    pub(super) batch: u64,
    digest: BatchDigest,
    cost: u64,
    opened: Option<Millis>,
    now: Millis,
    /// Cost of batches that are not applied yet.
    closed: VecDeque<(u64, u64)>,
    applied: u64,
    pub(super) durable: u64,
    armed: bool,
    epoch: Option<u64>,
    cut_asked: bool,
    /// The batch that says that the copies are alike.
    synced_in: Option<u64>,
}

impl Session {
    fn new(now: Millis, limits: SessionLimits) -> Self {
        Self {
            limits,
            throttle: Throttle::new(limits.soft, limits.hard),
            unsent: Throttle::new(limits.queue / 2, limits.queue),
            queue: VecDeque::new(),
            batch: 1,
            digest: BatchDigest::default(),
            cost: 0,
            opened: None,
            now,
            closed: VecDeque::new(),
            applied: 0,
            durable: 0,
            armed: false,
            epoch: None,
            cut_asked: false,
            synced_in: None,
        }
    }

    /// Returns the batch that it is in.
    pub(super) fn append(&mut self, record: Record) -> u64 {
        let batch = self.batch;
        self.digest.update(&record);
        self.cost += record.cost();
        self.opened.get_or_insert(self.now);
        self.queue.push_back(record);
        if !self.armed && self.cost >= self.limits.cut_bytes {
            self.end_batch(None);
        }
        batch
    }

    /// A record of ours, not the guest's: counted here.
    pub(super) fn append_own(&mut self, record: Record) -> u64 {
        self.count(record.cost());
        self.append(record)
    }

    /// A write asks to go on. It is counted if the answer is `Now`.
    pub(super) fn admit(&mut self, now: Millis, cost: u64) -> Admission {
        self.now = self.now.max(now);
        match (self.throttle.ask(now, cost), self.unsent.ask(now, cost)) {
            (Admission::Now, Admission::Now) => {
                self.throttle.take(now, cost);
                self.unsent.take(now, cost);
                Admission::Now
            }
            (Admission::Full, _) | (_, Admission::Full) => Admission::Full,
            (Admission::At(a), Admission::At(b)) => Admission::At(a.max(b)),
            (Admission::At(at), Admission::Now) | (Admission::Now, Admission::At(at)) => Admission::At(at),
        }
    }

    /// Counts without asking.
    pub(super) fn count(&mut self, cost: u64) {
        self.throttle.add(cost);
        self.unsent.add(cost);
    }

    /// What was counted does not come.
    pub(super) fn forget(&mut self, cost: u64) {
        self.throttle.forget(cost);
        self.unsent.forget(cost);
    }

    /// Whether synchronisation should pause in favour of the guest.
    pub(super) fn is_pressed(&self) -> bool {
        self.throttle.is_pressed() || self.unsent.is_pressed()
    }

    /// When something was sent or applied last. A large epoch on a narrow link is not applied for a while.
    pub(super) fn progressed_at(&self) -> Millis {
        self.unsent.drained_at().max(self.throttle.drained_at())
    }

    /// The newest batch with anything in it.
    pub(super) fn last_used(&self) -> u64 {
        if self.digest.is_empty() { self.batch - 1 } else { self.batch }
    }

    fn end_batch(&mut self, epoch: Option<u64>) -> BatchEnd {
        let end = self.digest.end(self.batch, epoch, self.armed);
        self.queue.push_back(Record::End(end));
        self.closed.push_back((self.batch, std::mem::take(&mut self.cost)));
        self.batch += 1;
        self.opened = None;
        self.cut_asked = false;
        end
    }

    pub(super) fn cut_at(&self) -> Option<Millis> {
        self.opened.filter(|_| !self.armed).map(|opened| opened + self.limits.cut_age)
    }

    pub(super) fn cut_by_age(&mut self, now: Millis) -> bool {
        self.now = self.now.max(now);
        let due = self.cut_at().is_some_and(|at| at <= now);
        if due {
            self.end_batch(None);
        }
        due
    }
}

impl Source {
    /// A peer is there, and its marks have been taken over ([`Source::mark`], [`Source::is_settled`]): what is marked is
    /// synchronised, and what the guest writes goes into batches.
    pub fn start_session(&mut self, now: Millis, limits: SessionLimits) {
        self.end_session(None);
        self.session = Some(Session::new(now, limits));
        self.scans.start(self.marks.unsynced());
        self.pump();
    }

    /// The peer is gone. Every write that waited goes on; what was not durable is marked.
    pub fn end_session(&mut self, why: Option<Lost>) {
        if self.session.take().is_some() {
            self.marks.lose_session();
            self.stop_scans();
            self.writes.values_mut().for_each(|w| w.counted = 0);
            self.actions.extend(why.map(Action::Lost));
        }
        let waiting: Vec<_> = self.waiting.drain(..).collect();
        waiting.into_iter().for_each(|(_, id)| self.lock(id));
    }

    /// Marks regions that differ for a reason of the caller's (the peer's marks).
    pub fn mark(&mut self, regions: impl IntoIterator<Item = u32>) {
        for region in regions {
            self.marks.set_unsent(region);
            self.want(region);
        }
    }

    /// Whether all marks are on disk.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.intent.is_settled()
    }

    /// From the running batch on, batches end only by [`Source::barrier`] and must not be applied before their epoch is
    /// committed.
    ///
    /// # Errors
    /// Without a session, or while the copies differ (R4).
    pub fn arm(&mut self) -> Result<(), SessionError> {
        let unsynced = self.marks.unsynced();
        let session = self.session.as_mut().ok_or(SessionError::NotConnected)?;
        if unsynced > 0 || session.synced_in.is_none_or(|batch| batch > session.applied) {
            return Err(SessionError::NotInSync(unsynced));
        }
        session.armed = true;
        Ok(())
    }

    /// Protection has ended here: batches are no longer bound to epochs. What the backup does with those it holds is
    /// decided there.
    pub fn disarm(&mut self) {
        if let Some(session) = &mut self.session {
            session.armed = false;
        }
    }

    /// The guest is suspended: all it was told to be done belongs to `epoch`. Waits for nothing.
    ///
    /// # Errors
    /// Without a session, or for an epoch that is not newer than the last.
    pub fn barrier(&mut self, epoch: u64) -> Result<BatchEnd, SessionError> {
        let session = self.session.as_mut().ok_or(SessionError::NotConnected)?;
        if session.epoch.is_some_and(|last| epoch <= last) {
            return Err(SessionError::OldEpoch(epoch));
        }
        session.epoch = Some(epoch);
        let end = session.end_batch(Some(epoch));
        self.actions.push(Action::Send);
        Ok(end)
    }

    /// The next record for the peer. Once it is given out it is forgotten: if the session breaks, the marks tell what
    /// was lost.
    pub fn next_record(&mut self) -> Option<Record> {
        let session = self.session.as_mut()?;
        let record = session.queue.pop_front()?;
        if !matches!(record, Record::End(_)) {
            session.unsent.drained(session.now, record.cost());
        }
        Some(record)
    }

    /// Whether [`Source::tick`] has something to do as soon as records were taken.
    #[must_use]
    pub fn waits_for_sending(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.unsent.is_pressed()) || !self.waiting.is_empty()
    }

    /// The peer has applied all batches up to `batch`.
    pub fn applied(&mut self, now: Millis, batch: u64) {
        let Some(session) = &mut self.session else { return };
        session.applied = session.applied.max(batch);
        let mut bytes = 0;
        while let Some((_, cost)) = session.closed.pop_front_if(|(closed, _)| *closed <= batch) {
            bytes += cost;
        }
        session.throttle.drained(now, bytes);
        self.tick(now);
    }

    /// All batches up to `batch` are on the peer's stable storage.
    pub fn durable(&mut self, batch: u64) {
        let Some(session) = &mut self.session else { return };
        session.durable = session.durable.max(batch);
        for region in self.marks.durable(batch) {
            if !self.pins.contains_key(&region) {
                self.retiring.insert(region);
            }
        }
    }

    /// Whether nothing is left to synchronise, and the peer has applied all of it.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        let told = self.session.as_ref().is_some_and(|s| s.synced_in.is_some_and(|batch| batch <= s.applied));
        told && self.marks.unsynced() == 0
    }

    /// Whether batches are bound to epochs.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.armed)
    }

    /// Bytes that are not sent yet.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.session.as_ref().map_or(0, |s| s.unsent.outstanding())
    }

    /// Bytes on their way, and bytes per second that the peer applies, with a session.
    #[must_use]
    pub fn pressure(&self) -> Option<(u64, u64)> {
        self.session.as_ref().map(|s| (s.throttle.outstanding(), s.throttle.rate()))
    }

    /// A checkpoint helps only with what is not in an epoch yet.
    pub(super) fn ask_for_cut(&mut self) {
        if let Some(session) = &mut self.session
            && session.armed
            && !session.cut_asked
            && session.throttle.outstanding() >= session.limits.early
            && session.cost >= session.limits.early / 8
        {
            session.cut_asked = true;
            self.actions.push(Action::CutWanted);
        }
    }

    /// The backup found that its copy of a region is not what it should be. It knows: until the next `SyncDone` it
    /// activates nothing.
    pub(super) fn differs(&mut self, region: u32) {
        self.mark([region]);
        if let Some(session) = &mut self.session
            && session.synced_in.take().is_some()
        {
            self.actions.push(Action::OutOfSync);
        }
    }

    /// Says so when nothing is left to synchronise.
    pub(super) fn announce_sync(&mut self) {
        if let Some(session) = &mut self.session
            && session.synced_in.is_none()
            && self.marks.unsynced() == 0
        {
            session.synced_in = Some(session.append_own(Record::SyncDone));
            self.actions.push(Action::Send);
        }
    }
}
