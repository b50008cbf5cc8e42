//! Reading single guest pages through fresh mappings, for the audit (rule R7, hazard F18): a mapping that is kept can go on showing a
//! frame that the guest has given back.

#[cfg(feature = "xen")]
mod ffi;
#[cfg(feature = "xen")]
mod real;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use xxhash_rust::xxh3::xxh3_128;

use super::hypervisor::XenError;
use crate::ids::DomId;
use crate::stream::item::{PAGE_SIZE, PageBatch};

#[cfg(feature = "xen")]
pub use real::XenPages;

/// Hash of one page: XXH3, 128 bits, as the epoch's digest.
pub type PageHash = u128;

/// The hash of a page's contents.
#[must_use]
pub fn hash(page: &[u8]) -> PageHash {
    xxh3_128(page)
}

/// Reads guest pages.
#[async_trait]
pub trait GuestPages: Send + Sync {
    /// The hash of each of these pages as it is now, in the same order. `None` for what is not a plain page of RAM that only the
    /// guest itself writes to: a hole, a page of Xen's (shared info, grant table), a page that is granted writable to another
    /// domain, which that domain changes without a trace in the log.
    ///
    /// Maps the pages for this call alone. Does not wait for the guest; takes some microseconds per page. At most 1024 pages. A
    /// dropped future does not end the reading.
    ///
    /// # Errors
    /// [`XenError`] when the domain or the interface cannot be used at all.
    async fn hashes(&self, domid: DomId, gfns: Vec<u64>) -> Result<Vec<Option<PageHash>>, XenError>;

    /// Those of these pages that a migration stream would carry, as they are now, in the same order. Holes are left out. Else as
    /// [`Self::hashes`].
    ///
    /// # Errors
    /// [`XenError`] when the domain or the interface cannot be used, or a page that is there not be mapped.
    async fn read(&self, domid: DomId, gfns: Vec<u64>) -> Result<PageBatch, XenError>;

    /// The highest page number that the domain has.
    ///
    /// # Errors
    /// [`XenError`] when the domain or the interface cannot be used.
    async fn last(&self, domid: DomId) -> Result<u64, XenError>;
}

/// Guest memory in memory.
#[derive(Debug, Default)]
pub struct FakePages {
    pages: Mutex<BTreeMap<(DomId, u64), [u8; 8]>>,
}

impl FakePages {
    /// No domain has any page.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn pages(&self) -> MutexGuard<'_, BTreeMap<(DomId, u64), [u8; 8]>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills a page with a word, again and again.
    pub fn write(&self, domid: DomId, gfn: u64, word: u64) {
        self.pages().insert((domid, gfn), word.to_le_bytes());
    }

    /// Takes a page away.
    pub fn remove(&self, domid: DomId, gfn: u64) {
        self.pages().remove(&(domid, gfn));
    }
}

#[async_trait]
impl GuestPages for FakePages {
    async fn hashes(&self, domid: DomId, gfns: Vec<u64>) -> Result<Vec<Option<PageHash>>, XenError> {
        let pages = self.pages();
        Ok(gfns.iter().map(|gfn| pages.get(&(domid, *gfn)).map(|word| hash(&word.repeat(PAGE_SIZE / 8)))).collect())
    }

    async fn read(&self, domid: DomId, gfns: Vec<u64>) -> Result<PageBatch, XenError> {
        let pages = self.pages();
        let there = gfns.into_iter().filter_map(|gfn| Some((gfn, pages.get(&(domid, gfn))?.repeat(PAGE_SIZE / 8))));
        let (entries, data): (Vec<_>, Vec<_>) = there.unzip();
        Ok(PageBatch { entries, data: data.concat().into() })
    }

    async fn last(&self, domid: DomId) -> Result<u64, XenError> {
        let pages = self.pages();
        let last = pages.keys().filter(|(of, _)| *of == domid).map(|(_, gfn)| *gfn).max();
        last.ok_or(XenError::NoDomain { domid })
    }
}
