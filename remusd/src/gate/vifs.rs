//! Opening and closing the interfaces that a domain has now.

use std::collections::BTreeMap;

use devices::netbuffer::{self, NetError};

use crate::ids::DomId;
use crate::xen::{StoreError, XenStore};

/// An interface cannot be opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum VifError {
    /// xenstore cannot be read.
    #[error("the interfaces of domain {domid} cannot be found: {source}")]
    Store {
        /// Which domain.
        domid: DomId,
        /// Why.
        source: StoreError,
    },
    /// The kernel refuses.
    #[error("{vif} of domain {domid}: {source}")]
    Net {
        /// Which domain.
        domid: DomId,
        /// Which interface.
        vif: String,
        /// Why.
        source: NetError,
    },
}

/// The names that a domain's interfaces have or may have: for each vif its own and that of an emulated card beside it, which only some
/// have.
///
/// # Errors
/// [`VifError::Store`].
pub async fn names(store: &dyn XenStore, domid: DomId) -> Result<Vec<String>, VifError> {
    let fail = |source| VifError::Store { domid, source };
    let root = format!("/libxl/{domid}/device/vif");
    let mut names = Vec::new();
    for devid in store.directory(&root).await.map_err(fail)? {
        let backend = store.read(&format!("{root}/{devid}/backend")).await.map_err(fail)?;
        let mut name = None;
        if let Some(backend) = backend.filter(|path| !path.is_empty()) {
            name = store.read(&format!("{backend}/vifname")).await.map_err(fail)?;
        }
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("vif{domid}.{devid}"));
        names.push(format!("{name}-emu"));
        names.push(name);
    }
    Ok(names)
}

/// Lifts the seals of all of a domain's interfaces. Only the owner may do this (R9). Fine where there is none. Returns the interfaces
/// that were sealed.
///
/// # Errors
/// [`VifError`]; those before it are open.
pub async fn open(store: &dyn XenStore, domid: DomId) -> Result<Vec<String>, VifError> {
    let mut opened = Vec::new();
    for vif in names(store, domid).await? {
        let fail = |source| VifError::Net { domid, vif: vif.clone(), source };
        match netbuffer::is_sealed(&vif).await {
            Ok(false) | Err(NetError::NoLink(_)) => continue,
            Ok(true) => netbuffer::unseal(&vif).await.map_err(fail)?,
            Err(error) => return Err(fail(error)),
        }
        opened.push(vif);
    }
    Ok(opened)
}

/// Whether an interface passes anything on. One that cannot be asked counts as one that does.
#[must_use]
pub fn is_up(vif: &str) -> bool {
    /// `IFF_UP` of `linux/if.h`.
    const UP: u32 = 1;
    let flags = std::fs::read_to_string(format!("/sys/class/net/{vif}/flags"));
    let flags = flags.ok().and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    flags.is_none_or(|flags| flags & UP != 0)
}

/// Which of a domain's interfaces are there, and whether each is sealed.
///
/// # Errors
/// [`VifError`].
pub async fn sealed(store: &dyn XenStore, domid: DomId) -> Result<BTreeMap<String, bool>, VifError> {
    let mut found = BTreeMap::new();
    for vif in names(store, domid).await? {
        match netbuffer::is_sealed(&vif).await {
            Ok(sealed) => drop(found.insert(vif, sealed)),
            Err(NetError::NoLink(_)) => {}
            Err(source) => return Err(VifError::Net { domid, vif, source }),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen::FakeStore;

    #[tokio::test]
    async fn every_interface_is_found_by_its_true_name() {
        let store = FakeStore::new();
        for (path, value) in [
            ("/libxl/7/device/vif/0/backend", "/local/domain/0/backend/vif/7/0"),
            ("/libxl/7/device/vif/1/backend", "/local/domain/0/backend/vif/7/1"),
            ("/local/domain/0/backend/vif/7/1/vifname", "web"),
            ("/libxl/8/device/vif/0/backend", "/local/domain/0/backend/vif/8/0"),
        ] {
            store.write(path, value).await.unwrap();
        }
        assert_eq!(names(&store, DomId(7)).await.unwrap(), ["vif7.0-emu", "vif7.0", "web-emu", "web"]);
        assert_eq!(names(&store, DomId(9)).await.unwrap(), Vec::<String>::new());
    }
}
