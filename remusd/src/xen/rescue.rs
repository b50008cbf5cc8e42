//! What the suspend guard does on a real host, with handles of its own: they are opened on its thread and used by nobody else.

use super::ffi::Control;
use super::guard::{Rescue, SuspendGuard};
use super::hypervisor::XenError;
use super::store::native::NativeStore;
use super::store::shutdown_path;
use crate::ids::DomId;

struct RealRescue {
    control: Control,
    store: NativeStore,
}

impl Rescue for RealRescue {
    fn rescue(&mut self, domid: DomId) -> Result<bool, String> {
        // The guest first: xenstored may be what hangs.
        let stood = self.control.resume_fast(domid);
        let withdrawn = self.store.compare_and_write(&shutdown_path(domid), Some("suspend"), "");
        let stood = match stood {
            Ok(stood) => stood,
            Err(XenError::NoDomain { .. }) => return Ok(false),
            Err(error) => return Err(error.to_string()),
        };
        if stood {
            self.store.resume_domain(domid).map_err(|error| error.to_string())?;
        }
        withdrawn.map_err(|error| error.to_string())?;
        Ok(stood)
    }
}

impl SuspendGuard {
    /// Starts the guard of a domain with real interfaces.
    ///
    /// # Errors
    /// [`XenError`] when the hypervisor interface or xenstored cannot be opened.
    pub fn start_real(domid: DomId) -> Result<Self, XenError> {
        Self::start(domid, || {
            let control = Control::open()?;
            let store = NativeStore::open().map_err(|error| XenError::Open { cause: error.to_string() })?;
            Ok(RealRescue { control, store })
        })
    }
}
