//! Capture engines: they turn the running guest into epochs.
//!
//! `save_helper` drives the stock `libxl-save-helper` and drains its stream into local memory, so that the guest waits for a copy
//! and not for a network. `native` reads the guest's log of dirty pages and its memory itself, and copies with all cores. Both yield
//! the same items and speak the same words to whoever drives them.

mod buffer;
mod drain;
pub mod engine;
pub mod ipc;
pub mod native;
pub mod save_helper;

use std::path::PathBuf;

#[cfg(test)]
pub(crate) use buffer::played;
pub use buffer::{CapturePause, CaptureStats, ItemReceiver};
pub use engine::{Engine, EngineCall};
pub use native::{NativeConfig, NativeEngine};
pub use save_helper::{SaveHelper, SaveHelperConfig};

use crate::ids::DomId;
use crate::stream::StreamError;

/// How much a capture may hold in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureBudget {
    /// Bytes of items not yet received, above which the helper has to wait while the guest runs. Default 64 MiB.
    pub soft: usize,
    /// Bytes above which a capture of a suspended guest is given up. Default 1 GiB.
    pub hard: usize,
}

impl Default for CaptureBudget {
    fn default() -> Self {
        Self { soft: 64 << 20, hard: 1 << 30 }
    }
}

/// A failed capture.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CaptureError {
    /// The helper is not there.
    #[error(
        "no libxl-save-helper at {path}; install the xen-utils package of the running Xen version, or set LIBXL_SAVE_HELPER"
    )]
    NoHelper {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The helper could not be started.
    #[error("cannot start {path} for domain {domid}: {cause}")]
    Spawn {
        /// The helper.
        path: PathBuf,
        /// The domain.
        domid: DomId,
        /// What the system said.
        cause: String,
    },
    /// The running Xen version cannot be told.
    #[error("cannot tell the running Xen version: {cause}; is this a dom0 with /sys/hypervisor?")]
    Version {
        /// What the system said.
        cause: String,
    },
    /// The pipes to the helper broke.
    #[error("lost the save helper of domain {domid} while {doing}: {cause}")]
    Io {
        /// The domain.
        domid: DomId,
        /// What was going on.
        doing: &'static str,
        /// What the system said.
        cause: String,
    },
    /// The helper said what it must not say.
    #[error("the save helper of domain {domid} broke its protocol: {cause}; is it of the running Xen version?")]
    Protocol {
        /// The domain.
        domid: DomId,
        /// What was wrong.
        cause: String,
    },
    /// The helper's stream is damaged.
    #[error("the save helper's stream of domain {domid} is damaged: {cause}")]
    Stream {
        /// The domain.
        domid: DomId,
        /// What was wrong.
        cause: StreamError,
    },
    /// The native engine cannot go on.
    #[error("the native capture of domain {domid} failed while {doing}: {cause}")]
    Native {
        /// The domain.
        domid: DomId,
        /// What was going on.
        doing: &'static str,
        /// Why.
        cause: String,
    },
    /// One epoch is bigger than the hard budget: resume the guest first, then stop the helper.
    #[error(
        "one epoch of domain {domid} needs more than {limit} bytes of memory; raise the capture budget or protect a less busy guest"
    )]
    OverBudget {
        /// The domain.
        domid: DomId,
        /// The hard budget.
        limit: usize,
    },
}

#[cfg(test)]
mod tests;
