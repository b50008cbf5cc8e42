//! Which regions differ, or may differ, from the backup's copy.
//!
//! Two watermarks (hazard F15): a region written in batch `b` stays marked until the backup says that `b` is *durable*;
//! that it holds or has applied `b` is not enough. Without a session every written region has to be synchronised.

use std::collections::BTreeMap;

const CLEAN: u64 = 0;
const SYNCING: u64 = u64::MAX - 1;
const UNSENT: u64 = u64::MAX;

/// The marks of one disk, in memory. [`super::intent`] keeps a superset of them on disk.
#[derive(Debug)]
pub struct Marks {
    /// Per region: clean, the newest batch that wrote it, being synchronised, or to be synchronised.
    stamps: Vec<u64>,
    by_batch: BTreeMap<u64, Vec<u32>>,
    /// To be or being synchronised.
    unsynced: u32,
    dirty: u32,
}

impl Marks {
    /// No region is marked.
    #[must_use]
    pub fn new(regions: u32) -> Self {
        Self { stamps: vec![CLEAN; regions as usize], by_batch: BTreeMap::new(), unsynced: 0, dirty: 0 }
    }

    fn set(&mut self, region: u32, stamp: u64) {
        let old = std::mem::replace(&mut self.stamps[region as usize], stamp);
        let is = |s: u64, f: fn(u64) -> bool| u32::from(f(s));
        self.dirty = self.dirty + is(stamp, |s| s != CLEAN) - is(old, |s| s != CLEAN);
        self.unsynced = self.unsynced + is(stamp, |s| s >= SYNCING) - is(old, |s| s >= SYNCING);
    }

    /// The region was written, and the record is in batch `batch` (1 and up).
    pub fn touch(&mut self, region: u32, batch: u64) {
        let stamp = self.stamps[region as usize];
        if stamp < SYNCING && stamp != batch {
            self.set(region, batch);
            self.by_batch.entry(batch).or_default().push(region);
        }
    }

    /// The backup's copy of the region cannot be told from the batches: it has to be synchronised.
    pub fn set_unsent(&mut self, region: u32) {
        self.set(region, UNSENT);
    }

    /// The first region at or after `from` that is to be synchronised.
    #[must_use]
    pub fn next_unsent(&self, from: u32) -> Option<u32> {
        let rest = self.stamps.get(from as usize..)?;
        rest.iter().position(|s| *s == UNSENT).map(|at| from + at as u32)
    }

    /// Synchronising the region begins.
    pub fn begin_sync(&mut self, region: u32) {
        self.set(region, SYNCING);
    }

    /// All of the region is compared or sent, the last of it in batch `batch`. `false` if it was marked anew meanwhile.
    pub fn end_sync(&mut self, region: u32, batch: u64) -> bool {
        if self.stamps[region as usize] != SYNCING {
            return false;
        }
        // Batch 0: nothing was logged in this session, which cannot be of a region that was checked; be safe.
        let batch = batch.max(1);
        self.set(region, batch);
        self.by_batch.entry(batch).or_default().push(region);
        true
    }

    /// Batches up to `batch` are on the backup's stable storage. Returns the regions that are clean now.
    pub fn durable(&mut self, batch: u64) -> Vec<u32> {
        let later = self.by_batch.split_off(&(batch + 1));
        let done = std::mem::replace(&mut self.by_batch, later);
        let mut cleaned = Vec::new();
        for region in done.into_values().flatten() {
            let stamp = self.stamps[region as usize];
            if stamp != CLEAN && stamp <= batch {
                self.set(region, CLEAN);
                cleaned.push(region);
            }
        }
        cleaned
    }

    /// The session is over: whatever was not durable has to be synchronised.
    pub fn lose_session(&mut self) {
        self.by_batch.clear();
        for region in 0..self.stamps.len() as u32 {
            if self.is_dirty(region) {
                self.set(region, UNSENT);
            }
        }
    }

    /// Whether the region is marked in any way.
    #[must_use]
    pub fn is_dirty(&self, region: u32) -> bool {
        self.stamps[region as usize] != CLEAN
    }

    /// Whether the region is to be or being synchronised.
    #[must_use]
    pub fn is_unsynced(&self, region: u32) -> bool {
        self.stamps[region as usize] >= SYNCING
    }

    /// Number of regions that are to be or being synchronised.
    #[must_use]
    pub fn unsynced(&self) -> u32 {
        self.unsynced
    }

    /// Number of marked regions.
    #[must_use]
    pub fn dirty(&self) -> u32 {
        self.dirty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_goes_only_when_its_newest_batch_is_durable() {
        let mut marks = Marks::new(4);
        marks.touch(1, 1);
        marks.touch(2, 1);
        marks.touch(1, 3);
        assert_eq!(marks.durable(2), [2]);
        assert!(marks.is_dirty(1));
        assert_eq!(marks.durable(3), [1]);
        assert_eq!((marks.dirty(), marks.unsynced()), (0, 0));
    }

    #[test]
    fn what_is_to_be_synchronised_is_not_cleaned_by_later_writes() {
        let mut marks = Marks::new(3);
        marks.set_unsent(0);
        marks.touch(0, 1);
        assert!(marks.durable(1).is_empty());
        marks.begin_sync(0);
        assert_eq!(marks.next_unsent(0), None);
        marks.touch(0, 2);
        assert!(marks.durable(2).is_empty());
        assert!(marks.end_sync(0, 3));
        assert_eq!(marks.unsynced(), 0);
        assert_eq!(marks.durable(3), [0]);
    }

    #[test]
    fn a_write_error_during_synchronisation_starts_it_again() {
        let mut marks = Marks::new(1);
        marks.set_unsent(0);
        marks.begin_sync(0);
        marks.set_unsent(0);
        assert!(!marks.end_sync(0, 5));
        assert_eq!(marks.next_unsent(0), Some(0));
    }

    #[test]
    fn losing_the_session_keeps_every_mark() {
        let mut marks = Marks::new(3);
        marks.touch(0, 1);
        marks.touch(1, 2);
        marks.durable(1);
        marks.lose_session();
        assert_eq!(marks.next_unsent(0), Some(1));
        assert_eq!((marks.dirty(), marks.unsynced()), (1, 1));
        assert!(marks.durable(9).is_empty(), "old batch numbers mean nothing any more");
    }
}
