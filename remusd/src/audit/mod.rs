//! The sampled audit (rule R7, hazard F18): in every armed epoch some pages that were *not* written to are compared between the guest
//! and its copy, each read through a mapping made for this alone. What the log of dirty pages has missed, and what went wrong between
//! the capture and the copy's memory, shows here and nowhere else: the epoch's digest only covers what was sent.
//!
//! The primary reads while the guest stands suspended ([`Chooser`] picks, [`Sample::keep_clean`] drops what turned out dirty) and sends
//! the hashes after the epoch's end. The backup compares once the receiver has taken in all of a later epoch ([`Comparer`]), without
//! the pages that were fed since. Nothing here reads pages or the clock: [`GuestPages`](crate::xen::GuestPages) does.

mod choose;
mod compare;

use std::collections::BTreeSet;

pub use choose::{Chooser, Held};
pub use compare::{Check, Comparer, Report};

use crate::ids::Epoch;
use crate::stream::PageBatch;
use crate::xen::PageHash;

/// Pages compared per epoch unless told otherwise.
pub const PAGES_PER_EPOCH: usize = 16;

/// How a report of a difference begins, in the words that the backup tells the primary why it has no copy any more.
pub const DIFFERS: &str = "the copy differs from the guest";

/// Most pages in one sample, on either side.
pub const MAX_PAGES: usize = 64;

/// The pages of one epoch as the guest has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The epoch at whose suspend they were read.
    pub epoch: Epoch,
    /// Page number and hash.
    pub pages: Vec<(u64, PageHash)>,
}

impl Sample {
    /// What was read of the chosen pages, without those that could not be compared.
    #[must_use]
    pub fn of(epoch: Epoch, gfns: &[u64], hashes: &[Option<PageHash>]) -> Self {
        let pages = gfns.iter().zip(hashes).filter_map(|(gfn, hash)| Some((*gfn, (*hash)?))).collect();
        Self { epoch, pages }
    }

    /// Leaves out the pages that the epoch carries, since these are not what the audit is for, and then all but `most`.
    pub fn keep_clean(&mut self, dirty: &BTreeSet<u64>, most: usize) {
        self.pages.retain(|(gfn, _)| !dirty.contains(gfn));
        self.pages.truncate(most);
    }
}

/// The page number of a `PAGE_DATA` entry.
#[must_use]
pub fn gfn(entry: u64) -> u64 {
    entry & ((1 << 52) - 1)
}

/// The page numbers of a batch.
pub fn gfns(batch: &PageBatch) -> impl Iterator<Item = u64> + '_ {
    batch.entries.iter().map(|entry| gfn(*entry))
}

#[cfg(test)]
mod tests;
