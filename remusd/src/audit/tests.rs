//! The selection by properties, the comparison against a model of both memories.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::ids::{DomId, Nonce};
use crate::stream::PAGE_SIZE;
use crate::xen::{FakePages, GuestPages};

const XTAB: u64 = 0xf << 60;

fn batch(entries: impl IntoIterator<Item = u64>) -> PageBatch {
    let entries: Vec<u64> = entries.into_iter().collect();
    let data = entries.iter().filter(|e| PageBatch::has_data(**e)).count() * PAGE_SIZE;
    PageBatch { entries, data: Bytes::from(vec![0; data]) }
}

fn held(gfns: impl IntoIterator<Item = u64>) -> Held {
    let mut held = Held::new();
    held.sent(&batch(gfns));
    held
}

proptest! {
    #[test]
    fn only_held_pages_are_chosen_each_once_and_again_the_same(
        // Also across the hole below 4 GiB and in sparse memories.
        gfns in prop::collection::btree_set(prop_oneof![0u64..300, 0xe_fff0u64..0x10_0010, 0x10_0000u64..0x40_0000], 0..80),
        holes in prop::collection::vec(0u64..300, 0..40),
        nonce: u128, epoch in 0u64..1000, count in 0usize..100,
    ) {
        let mut held = held(gfns.iter().copied());
        held.sent(&batch(holes.iter().map(|gfn| gfn | XTAB)));
        let expected: BTreeSet<u64> = gfns.iter().copied()
            .filter(|gfn| !holes.contains(gfn) && !(0xf_0000..0x10_0000).contains(gfn)).collect();
        prop_assert_eq!(held.count(), expected.len() as u64);
        let chooser = Chooser::new(Nonce(uuid::Uuid::from_u128(nonce)));
        let chosen = chooser.choose(&held, Epoch(epoch), count);
        let set: BTreeSet<u64> = chosen.iter().copied().collect();
        prop_assert_eq!(set.len(), chosen.len());
        prop_assert!(set.is_subset(&expected));
        prop_assert!(chosen.len() <= count.min(MAX_PAGES));
        prop_assert_eq!(chosen.is_empty(), expected.is_empty() || count == 0);
        prop_assert_eq!(&chosen, &chooser.choose(&held, Epoch(epoch), count));
    }

    #[test]
    fn a_sample_keeps_what_was_read_and_is_clean(
        read in prop::collection::vec((0u64..64, prop::option::of(any::<u128>())), 0..40),
        dirty in prop::collection::btree_set(0u64..64, 0..32), most in 0usize..20,
    ) {
        let (gfns, hashes): (Vec<_>, Vec<_>) = read.iter().copied().unzip();
        let mut sample = Sample::of(Epoch(3), &gfns, &hashes);
        sample.keep_clean(&dirty, most);
        prop_assert!(sample.pages.len() <= most);
        for (gfn, hash) in &sample.pages {
            prop_assert!(!dirty.contains(gfn) && read.contains(&(*gfn, Some(*hash))));
        }
        let clean = read.iter().filter(|(gfn, hash)| hash.is_some() && !dirty.contains(gfn)).count();
        prop_assert_eq!(sample.pages.len(), clean.min(most));
    }

    /// Guest and copy over some epochs. The receiver takes in what is fed with a delay. Whatever the schedule, only pages with a write
    /// that the log has missed are blamed.
    #[test]
    fn a_healthy_page_is_never_blamed(
        epochs in prop::collection::vec((prop::collection::btree_set(0u64..24, 0..6), 0usize..3, any::<bool>()), 1..20),
        missed in prop::option::of((0usize..20, 0u64..24)),
        nonce: u128,
    ) {
        let mut guest: BTreeMap<u64, u128> = (0..24).map(|gfn| (gfn, u128::from(gfn))).collect();
        let mut copy = guest.clone();
        let held = held(0..24);
        let chooser = Chooser::new(Nonce(uuid::Uuid::from_u128(nonce)));
        let mut comparer = Comparer::new();
        // What is fed and not applied: (epoch, pages).
        let mut queue: Vec<(Epoch, BTreeMap<u64, u128>)> = Vec::new();
        let mut damaged: BTreeSet<u64> = BTreeSet::new();
        let mut value = 1000;
        for (index, (dirty, lag, read_late)) in epochs.iter().enumerate() {
            let epoch = Epoch(index as u64 + 1);
            for gfn in dirty {
                value += 1;
                guest.insert(*gfn, value);
                damaged.remove(gfn);
            }
            if let Some((at, gfn)) = missed && at == index && !dirty.contains(&gfn) {
                value += 1;
                guest.insert(gfn, value);
                damaged.insert(gfn);
            }
            // At the suspend: read, and drop what is dirty.
            let chosen = chooser.choose(&held, epoch, 16);
            let hashes: Vec<_> = chosen.iter().map(|gfn| guest.get(gfn).copied()).collect();
            let mut sample = Sample::of(epoch, &chosen, &hashes);
            sample.keep_clean(dirty, 8);
            // The epoch arrives, is fed; its sample follows.
            comparer.fed(&batch(dirty.iter().copied()));
            queue.push((epoch, dirty.iter().map(|gfn| (*gfn, guest[gfn])).collect()));
            comparer.sample(sample.clone());
            // The receiver has read all but the last `lag` epochs, and applied all of those but the very last it has read.
            while queue.len() > *lag {
                let (epoch, pages) = queue.remove(0);
                // Read, not yet applied.
                let check = comparer.drained(epoch);
                if !read_late {
                    copy.extend(&pages);
                }
                if let Some(check) = &check {
                    let hashes: Vec<_> = check.gfns.iter().map(|gfn| copy.get(gfn).copied()).collect();
                    let report = comparer.read(check, &hashes).unwrap();
                    for gfn in &report.differ {
                        prop_assert!(damaged.contains(gfn), "page {} blamed at {}", gfn, report.epoch);
                    }
                    // All that had not been fed anew was compared.
                    prop_assert_eq!(report.compared, check.gfns.len());
                }
                copy.extend(&pages);
            }
        }
    }
}

#[test]
fn a_missed_write_is_reported_once_the_next_epoch_is_in() {
    let mut comparer = Comparer::new();
    comparer.sample(Sample { epoch: Epoch(5), pages: vec![(1, 11), (2, 22), (3, 33)] });
    assert_eq!(comparer.drained(Epoch(5)), None, "its own epoch may still be on its way into memory");
    comparer.fed(&batch([2]));
    let check = comparer.drained(Epoch(6)).unwrap();
    assert_eq!(check, Check { epoch: Epoch(5), gfns: vec![1, 3] });
    let report = comparer.read(&check, &[Some(11), Some(34)]).unwrap();
    assert_eq!(report, Report { epoch: Epoch(5), compared: 2, skipped: 1, differ: vec![3] });
    assert!(report.to_string().contains("0x3"));
    assert_eq!(comparer.read(&check, &[Some(11), Some(34)]), None);
}

#[test]
fn what_is_fed_while_it_is_read_is_left_out() {
    let mut comparer = Comparer::new();
    comparer.sample(Sample { epoch: Epoch(5), pages: vec![(1, 11), (3, 33)] });
    let check = comparer.drained(Epoch(6)).unwrap();
    comparer.fed(&batch([3]));
    assert_eq!(comparer.drained(Epoch(7)), None, "one at a time");
    let report = comparer.read(&check, &[Some(11), Some(99)]).unwrap();
    assert_eq!((report.compared, report.skipped, report.differ.len()), (1, 1, 0));
}

#[test]
fn a_copy_that_is_far_behind_costs_no_memory() {
    let mut comparer = Comparer::new();
    for epoch in 0..1000 {
        comparer.sample(Sample { epoch: Epoch(epoch), pages: vec![(epoch, 1)] });
    }
    assert_eq!(comparer.drained(Epoch(1000)).unwrap().epoch, Epoch(999));
    assert_eq!(comparer.drained(Epoch(1000)), None);
}

#[tokio::test]
async fn the_fakes_agree_when_their_memories_do() {
    let (here, there) = (FakePages::new(), FakePages::new());
    for pages in [&here, &there] {
        pages.write(DomId(1), 7, 5);
        pages.write(DomId(1), 8, 6);
    }
    there.write(DomId(1), 8, 9);
    let gfns = vec![7, 8, 9];
    let sample = Sample::of(Epoch(1), &gfns, &here.hashes(DomId(1), gfns.clone()).await.unwrap());
    assert_eq!(sample.pages.len(), 2, "the hole is not in it");
    let mut comparer = Comparer::new();
    comparer.sample(sample);
    let check = comparer.drained(Epoch(2)).unwrap();
    let hashes = there.hashes(DomId(1), check.gfns.clone()).await.unwrap();
    assert_eq!(comparer.read(&check, &hashes).unwrap().differ, [8]);
}
