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
use crate::stream::item::PAGE_SIZE;

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
}
