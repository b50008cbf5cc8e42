//! From what an operator types to a domain.

use std::sync::Arc;

use crate::api::{ApiError, ErrorCode};
use crate::ids::{DomId, ProtectionId};
use crate::ops::DomainRef;
use crate::xen::{DomainInfo, Hypervisor, XenStore};

/// A domain that exists now.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its identity in events.
    pub domain: DomainRef,
    /// What Xen says of it.
    pub info: DomainInfo,
}

/// The name that xenstore has for a domain.
pub async fn name_of(store: &dyn XenStore, domid: DomId) -> Option<String> {
    store.read(&format!("/local/domain/{domid}/name")).await.ok().flatten()
}

/// Whether a protection is the one that an operator means by a name or UUID.
#[must_use]
pub fn means(typed: &str, name: &str, uuid: ProtectionId) -> bool {
    typed == name || typed.parse() == Ok(uuid)
}

/// Finds a domain by name, id or UUID.
///
/// # Errors
/// `NotFound` if there is none, `Unsupported` for dom0, `Failed` when Xen cannot be asked.
pub async fn domain(
    hypervisor: &Arc<dyn Hypervisor>,
    store: &Arc<dyn XenStore>,
    typed: &str,
) -> Result<Resolved, ApiError> {
    let failed = |e: crate::xen::XenError| ApiError::new(ErrorCode::Failed, e.to_string());
    for info in hypervisor.domains().await.map_err(failed)? {
        let name = name_of(&**store, info.domid).await.unwrap_or_default();
        if typed.parse() == Ok(info.domid.0) || means(typed, &name, info.uuid) {
            if info.domid.0 == 0 {
                return Err(ApiError::new(
                    ErrorCode::Unsupported,
                    "Domain-0 cannot be protected: it runs the checkpoints",
                ));
            }
            let domain = DomainRef { domid: Some(info.domid), name, uuid: info.uuid };
            return Ok(Resolved { domain, info });
        }
    }
    Err(ApiError::new(ErrorCode::NotFound, format!("No domain is called {typed}; `xl list` shows those of this host")))
}
