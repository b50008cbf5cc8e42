//! The pages that both sides remember.
//!
//! A fixed number of page frames; half of them can hold committed pages, so that at least the other half is there for an epoch's
//! new contents. Committed pages stand in sets of eight by a hash of their number; a page that finds its set full takes the place of
//! the one whose last use is longest ago, but never of one that the same epoch has used: an epoch that is larger than the cache fills
//! it once and leaves it at that. Every decision depends only on the operations since the last commit and their order.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::encoding;
use crate::audit::gfn;
use crate::stream::PAGE_SIZE;

/// Committed pages per set.
const WAYS: usize = 8;
/// Marks an empty way.
const EMPTY: u64 = u64::MAX;
/// Spreads neighbouring page numbers over the sets (the golden ratio in 64 bits).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Clone, Copy, Debug)]
struct Entry {
    gfn: u64,
    frame: u32,
    /// The commit that used it last.
    used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// New contents, in this frame.
    Put(u32),
    /// Same contents, used again.
    Touch,
    /// Nothing known any more: a page of zeros, or no frame was free.
    Drop,
}

/// One side's memory of the pages that went over the link. See the module's text.
pub struct PageCache {
    frames: Vec<u8>,
    free: Vec<u32>,
    entries: Vec<Entry>,
    set_bits: u32,
    commits: u64,
    /// What the open epoch changes, in the order of first mention.
    order: Vec<u64>,
    /// Never listed, so that its order, which is this process's own, decides nothing.
    changes: HashMap<u64, Change, RandomState>,
}

impl std::fmt::Debug for PageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCache")
            .field("frames", &(self.frames.len() / PAGE_SIZE))
            .field("free", &self.free.len())
            .field("commits", &self.commits)
            .finish_non_exhaustive()
    }
}

impl PageCache {
    /// Empty, of at most `limit` bytes of pages (and about 2 % of it for the tables). Both sides must give the same limit. Less than
    /// 64 KiB is no cache at all. Memory is taken from the system as it is used.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        let pages = u32::try_from(limit / PAGE_SIZE).unwrap_or(u32::MAX) as usize;
        let sets = pages / 2 / WAYS;
        let set_bits = sets.checked_ilog2().unwrap_or(0);
        let entries = if sets == 0 { 0 } else { WAYS << set_bits };
        // As many for an epoch's new pages as there are committed ones.
        let frames = entries * 2;
        Self {
            frames: vec![0; frames * PAGE_SIZE],
            free: (0..frames as u32).rev().collect(),
            entries: vec![Entry { gfn: EMPTY, frame: 0, used: 0 }; entries],
            set_bits,
            commits: 0,
            order: Vec::with_capacity(frames),
            changes: HashMap::with_capacity_and_hasher(frames, RandomState::default()),
        }
    }

    /// Bytes of pages that it can hold, committed and new together.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.frames.len()
    }

    fn set(&self, gfn: u64) -> std::ops::Range<usize> {
        if self.entries.is_empty() {
            return 0..0;
        }
        let set = if self.set_bits == 0 { 0 } else { (gfn.wrapping_mul(SPREAD) >> (64 - self.set_bits)) as usize };
        set * WAYS..(set + 1) * WAYS
    }

    fn frame(&self, frame: u32) -> &[u8] {
        let at = frame as usize * PAGE_SIZE;
        &self.frames[at..at + PAGE_SIZE]
    }

    /// The committed contents of a page.
    #[must_use]
    pub fn committed(&self, gfn: u64) -> Option<&[u8]> {
        self.entries[self.set(gfn)].iter().find(|entry| entry.gfn == gfn).map(|entry| self.frame(entry.frame))
    }

    fn entry(&mut self, gfn: u64) -> Option<&mut Entry> {
        let set = self.set(gfn);
        self.entries[set].iter_mut().find(|entry| entry.gfn == gfn)
    }

    /// Notes the pages of a part of the open epoch, as encoded: what both sides do with each part, so that they stay alike.
    pub fn take_part(&mut self, entries: &[u64], encodings: &[u8], data: &[u8]) {
        let mut pages = data.chunks_exact(PAGE_SIZE);
        for (entry, code) in entries.iter().zip(encodings).filter(|(_, code)| **code != encoding::NONE) {
            let Some(page) = pages.next() else { break };
            let gfn = gfn(*entry);
            match *code {
                encoding::ZERO => self.put_zero(gfn),
                encoding::UNCHANGED => self.touch(gfn),
                _ => self.put(gfn, page),
            }
        }
    }

    /// The open epoch has this page, with these contents; the last mention counts. Without a free frame it will not be remembered.
    pub fn put(&mut self, gfn: u64, page: &[u8]) {
        if let Some(Change::Put(frame)) = self.changes.get(&gfn).copied() {
            self.fill(frame, page);
        } else if let Some(frame) = self.free.pop() {
            self.fill(frame, page);
            self.note(gfn, Change::Put(frame));
        } else if self.committed(gfn).is_some() {
            self.note(gfn, Change::Drop);
        }
    }

    /// As [`put`](Self::put), for a page of zeros: it needs no frame, as that is what an unknown page counts as.
    pub fn put_zero(&mut self, gfn: u64) {
        if let Some(Change::Put(frame)) = self.changes.get(&gfn).copied() {
            self.fill(frame, &super::ZERO_PAGE);
        } else if self.committed(gfn).is_some() {
            self.note(gfn, Change::Drop);
        }
    }

    /// The open epoch has this page, with its committed contents.
    pub fn touch(&mut self, gfn: u64) {
        if let Some(Change::Put(frame)) = self.changes.get(&gfn).copied() {
            if let Some(entry) = self.entry(gfn).copied() {
                let from = entry.frame as usize * PAGE_SIZE;
                self.frames.copy_within(from..from + PAGE_SIZE, frame as usize * PAGE_SIZE);
            }
        } else if self.committed(gfn).is_some() {
            self.note(gfn, Change::Touch);
        }
    }

    fn fill(&mut self, frame: u32, page: &[u8]) {
        let at = frame as usize * PAGE_SIZE;
        self.frames[at..at + PAGE_SIZE].copy_from_slice(page);
    }

    /// At most one note for each frame and each committed page: bounded.
    fn note(&mut self, gfn: u64, change: Change) {
        if self.changes.insert(gfn, change).is_none() {
            self.order.push(gfn);
        }
    }

    /// The open epoch is whole: what it has said is what later ones are encoded against.
    pub fn commit(&mut self) {
        self.commits += 1;
        let order = std::mem::take(&mut self.order);
        // Pages that are known first, so that a new one takes the place of none of them.
        for gfn in &order {
            let Some(change) = self.changes.get(gfn).copied() else { continue };
            let commits = self.commits;
            let Some(entry) = self.entry(*gfn) else { continue };
            entry.used = commits;
            let old = entry.frame;
            match change {
                Change::Put(frame) => entry.frame = frame,
                Change::Touch => continue,
                Change::Drop => entry.gfn = EMPTY,
            }
            self.free.push(old);
            self.changes.remove(gfn);
        }
        for gfn in &order {
            if let Some(Change::Put(frame)) = self.changes.get(gfn).copied() {
                self.admit(*gfn, frame);
            }
        }
        self.changes.clear();
        self.order = order;
        self.order.clear();
    }

    fn admit(&mut self, gfn: u64, frame: u32) {
        let set = self.set(gfn);
        let commits = self.commits;
        let oldest = self.entries[set].iter_mut().min_by_key(|entry| if entry.gfn == EMPTY { 0 } else { entry.used });
        let unneeded = match oldest {
            Some(entry) if entry.gfn == EMPTY => {
                *entry = Entry { gfn, frame, used: commits };
                return;
            }
            Some(entry) if entry.used < commits => {
                let old = entry.frame;
                *entry = Entry { gfn, frame, used: commits };
                old
            }
            _ => frame,
        };
        self.free.push(unneeded);
    }

    /// The open epoch is given up: everything is as after the last commit.
    pub fn abandon(&mut self) {
        for index in 0..self.order.len() {
            if let Some(Change::Put(frame)) = self.changes.get(&self.order[index]).copied() {
                self.free.push(frame);
            }
        }
        self.order.clear();
        self.changes.clear();
    }

    /// A digest of all that is committed, to hold two caches against each other in tests.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(&(self.free.len() as u64).to_le_bytes());
        for entry in &self.entries {
            hash.update(&entry.gfn.to_le_bytes());
            hash.update(&entry.used.to_le_bytes());
            if entry.gfn != EMPTY {
                hash.update(self.frame(entry.frame));
            }
        }
        hash.digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> [u8; PAGE_SIZE] {
        [byte; PAGE_SIZE]
    }

    #[test]
    fn only_a_commit_changes_what_is_known() {
        let mut cache = PageCache::new(1 << 20);
        cache.put(5, &page(1));
        assert_eq!(cache.committed(5), None);
        cache.commit();
        assert_eq!(cache.committed(5), Some(&page(1)[..]));
        let before = cache.fingerprint();
        cache.put(5, &page(2));
        cache.put_zero(5);
        cache.put(6, &page(3));
        cache.abandon();
        assert_eq!(cache.fingerprint(), before);
        cache.put_zero(5);
        cache.commit();
        assert_eq!(cache.committed(5), None);
    }

    #[test]
    fn the_last_mention_counts() {
        let mut cache = PageCache::new(1 << 20);
        cache.put(5, &page(1));
        cache.commit();
        cache.put(5, &page(2));
        cache.touch(5);
        cache.commit();
        assert_eq!(cache.committed(5), Some(&page(1)[..]));
        cache.put_zero(5);
        cache.put(5, &page(3));
        cache.commit();
        assert_eq!(cache.committed(5), Some(&page(3)[..]));
    }

    #[test]
    fn an_epoch_larger_than_the_cache_leaves_nothing_stale() {
        let mut cache = PageCache::new(64 * PAGE_SIZE);
        for round in 1..4u8 {
            for gfn in 0..1000 {
                cache.put(gfn, &page(round));
            }
            cache.commit();
            let known = (0..1000).filter(|gfn| cache.committed(*gfn).is_some()).count();
            assert!(known > 8 && known <= 32, "{known}");
            assert!((0..1000).all(|gfn| cache.committed(gfn).is_none_or(|known| known == page(round))));
            assert_eq!(cache.free.len() + known, 64, "no frame is lost");
        }
    }

    #[test]
    fn pages_in_use_stay() {
        let mut cache = PageCache::new(64 * PAGE_SIZE);
        (0..4).for_each(|gfn| cache.put(gfn, &page(9)));
        cache.commit();
        for epoch in 1..100 {
            (0..4).for_each(|gfn| cache.touch(gfn));
            (0..16).for_each(|index| cache.put(epoch * 100 + index, &page(1)));
            cache.commit();
        }
        assert!((0..4).all(|gfn| cache.committed(gfn).is_some()));
    }

    #[test]
    fn a_cache_of_nothing_remembers_nothing() {
        let mut cache = PageCache::new(100);
        cache.put(5, &page(1));
        cache.touch(5);
        cache.put_zero(6);
        cache.commit();
        assert_eq!((cache.committed(5), cache.capacity()), (None, 0));
    }
}
