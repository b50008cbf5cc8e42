//! The newest epochs of a protection, for `remus trace`.

use std::time::{Instant, SystemTime};

use super::Daemon;
use crate::api::{ApiError, ErrorCode, Trace};

/// Unless the caller says how many.
const DEFAULT: u32 = 10;

impl Daemon {
    /// The newest epochs of a protection from this host, also of one that has ended, until the next of the same domain.
    ///
    /// # Errors
    /// `NotFound` without such a protection, `Conflict` when no epoch of it has been finished, `Invalid` when none is asked for.
    pub(super) async fn trace(&self, typed: &str, epochs: Option<u32>) -> Result<Trace, ApiError> {
        let count = epochs.unwrap_or(DEFAULT) as usize;
        if count == 0 {
            return Err(ApiError::new(ErrorCode::Invalid, "epochs is 0: ask for one at least"));
        }
        let primaries = self.primaries.lock().await;
        let Some(primary) = primaries.values().find(|primary| primary.domain.is_meant_by(typed)) else {
            let copy = self.backups.list().iter().any(|status| status.offer.domain == typed);
            let hint = if copy { ": its copy is kept here; ask the host that runs it" } else { "" };
            return Err(ApiError::new(ErrorCode::NotFound, format!("{typed} is not protected from this host{hint}")));
        };
        let epochs = primary.handle.trace.newest(count, Instant::now(), SystemTime::now());
        if epochs.is_empty() {
            let text = format!("no epoch of {typed} has been finished yet; `remus status {typed}` shows how it stands");
            return Err(ApiError::new(ErrorCode::Conflict, text));
        }
        Ok(Trace { domain: primary.domain.clone(), peer: primary.target.label(), epochs })
    }
}
