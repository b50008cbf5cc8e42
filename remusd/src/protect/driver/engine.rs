//! Which engine captures the guest.

use std::path::PathBuf;

use super::super::options::{EngineKind, ProtectOptions};
use crate::capture::{CaptureBudget, CaptureError, Engine, ItemReceiver, SaveHelper, SaveHelperConfig};
#[cfg(feature = "xen")]
use crate::capture::{NativeConfig, NativeEngine};
use crate::ids::DomId;

/// Starts the engine that the options name; it begins to copy at once.
pub(super) async fn open_engine(
    domid: DomId,
    options: &ProtectOptions,
    helper: Option<PathBuf>,
) -> Result<(Box<dyn Engine>, ItemReceiver), CaptureError> {
    let hard = usize::try_from(options.epoch_budget).unwrap_or(usize::MAX);
    let budget = CaptureBudget { hard, ..CaptureBudget::default() };
    match options.engine {
        EngineKind::SaveHelper => {
            let (engine, items) = SaveHelper::spawn(SaveHelperConfig { domid, helper, budget }).await?;
            Ok((Box::new(engine), items))
        }
        #[cfg(feature = "xen")]
        EngineKind::Native => {
            // Late enough for pages to have come to rest, early enough to be done by the suspend.
            let ahead_after = Some(options.longest_interval() * 3 / 5);
            let (engine, items) = NativeEngine::spawn(NativeConfig { domid, budget, ahead_after }).await?;
            Ok((Box::new(engine), items))
        }
        #[cfg(not(feature = "xen"))]
        EngineKind::Native => {
            Err(CaptureError::Native { domid, doing: "starting", cause: "this build has no Xen support".into() })
        }
    }
}
