//! The backup's half: when a sample can be compared, and with what.

use std::collections::{BTreeMap, VecDeque};

use super::{DIFFERS, MAX_PAGES, Sample, gfn};
use crate::ids::Epoch;
use crate::stream::PageBatch;
use crate::xen::PageHash;

/// Samples that may wait; the primary is at most an epoch ahead, so more means that the receiver is behind. The oldest go.
const WAITING: usize = 8;

/// What is to be read now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Names it in [`Comparer::read`].
    pub epoch: Epoch,
    /// The copy's pages.
    pub gfns: Vec<u64>,
}

/// How a comparison ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The sample's epoch.
    pub epoch: Epoch,
    /// Pages that were compared.
    pub compared: usize,
    /// Pages that were not: fed anew meanwhile, or no plain memory.
    pub skipped: usize,
    /// Pages whose contents differ.
    pub differ: Vec<u64>,
}

#[derive(Debug)]
struct Waiting {
    epoch: Epoch,
    pages: BTreeMap<u64, PageHash>,
    of: usize,
}

/// Compares samples with the copy.
#[derive(Debug, Default)]
pub struct Comparer {
    waiting: VecDeque<Waiting>,
    reading: Option<Waiting>,
}

impl Comparer {
    /// One that has no sample.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A sample came in, after its epoch's end and before the next epoch.
    pub fn sample(&mut self, sample: Sample) {
        let of = sample.pages.len();
        let pages: BTreeMap<_, _> = sample.pages.into_iter().take(MAX_PAGES).collect();
        if self.waiting.len() == WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Waiting { epoch: sample.epoch, pages, of });
    }

    /// These pages go to the receiver now: whatever was sampled of them before is of the past. Call before they are queued.
    pub fn fed(&mut self, batch: &PageBatch) {
        if self.waiting.is_empty() && self.reading.is_none() {
            return;
        }
        for entry in &batch.entries {
            for sample in self.waiting.iter_mut().chain(&mut self.reading) {
                sample.pages.remove(&gfn(*entry));
            }
        }
    }

    /// The receiver has read all of this epoch, so it has applied all of every earlier one. Returns what is to be read now.
    pub fn drained(&mut self, epoch: Epoch) -> Option<Check> {
        if self.reading.is_some() {
            return None;
        }
        let ready = self.waiting.iter().rposition(|sample| sample.epoch < epoch)?;
        // The newest suffices: it has lost the fewest pages to later epochs.
        let sample = self.waiting.drain(..=ready).next_back()?;
        let check = Check { epoch: sample.epoch, gfns: sample.pages.keys().copied().collect() };
        self.reading = Some(sample);
        Some(check)
    }

    /// What was read for a check. `None` when it was not the one under way.
    pub fn read(&mut self, check: &Check, hashes: &[Option<PageHash>]) -> Option<Report> {
        let sample = self.reading.take_if(|sample| sample.epoch == check.epoch)?;
        let mut report = Report { epoch: sample.epoch, compared: 0, skipped: 0, differ: Vec::new() };
        for (gfn, hash) in check.gfns.iter().zip(hashes) {
            // Pages fed since have left the sample.
            if let (Some(theirs), Some(ours)) = (sample.pages.get(gfn), hash) {
                report.compared += 1;
                if theirs != ours {
                    report.differ.push(*gfn);
                }
            }
        }
        report.skipped = sample.of - report.compared;
        Some(report)
    }

    /// The pages of a check could not be read.
    pub fn unread(&mut self, check: &Check) {
        self.reading.take_if(|sample| sample.epoch == check.epoch);
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list: Vec<String> = self.differ.iter().map(|gfn| format!("{gfn:#x}")).collect();
        write!(
            f,
            "{DIFFERS} at epoch {} in {} of {} audited pages (gfn {})",
            self.epoch,
            self.differ.len(),
            self.compared,
            list.join(", ")
        )
    }
}
