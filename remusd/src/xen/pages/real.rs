//! The real pages: one thread owns the interfaces, so that reading never waits behind another call to the hypervisor.

use async_trait::async_trait;

use super::ffi::Pages;
use super::{GuestPages, PageHash};
use crate::ids::DomId;
use crate::stream::item::PageBatch;
use crate::xen::hypervisor::XenError;
use crate::xen::owner::{Lost, Owner};

/// Guest pages of this host.
pub struct XenPages {
    owner: Owner<Pages>,
}

impl XenPages {
    /// Opens the interfaces.
    ///
    /// # Errors
    /// [`XenError`] when this is not a dom0, or without libxenforeignmemory1.
    pub fn open() -> Result<Self, XenError> {
        let owner = Owner::start("remus-pages", Pages::open, |cause| XenError::Open { cause })?;
        Ok(Self { owner })
    }
}

#[async_trait]
impl GuestPages for XenPages {
    async fn hashes(&self, domid: DomId, gfns: Vec<u64>) -> Result<Vec<Option<PageHash>>, XenError> {
        let read = self.owner.call(move |pages| pages.hashes(domid, &gfns)).await;
        match read {
            Ok(hashes) => hashes,
            Err(Lost) => Err(XenError::OwnerGone),
        }
    }

    async fn read(&self, domid: DomId, gfns: Vec<u64>) -> Result<PageBatch, XenError> {
        match self.owner.call(move |pages| pages.read(domid, &gfns)).await {
            Ok(batch) => batch,
            Err(Lost) => Err(XenError::OwnerGone),
        }
    }

    async fn last(&self, domid: DomId) -> Result<u64, XenError> {
        match self.owner.call(move |pages| pages.last(domid)).await {
            Ok(last) => last,
            Err(Lost) => Err(XenError::OwnerGone),
        }
    }
}
