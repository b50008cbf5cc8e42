//! Drills of the copies that this host holds.

use std::time::Duration;

use super::Registry;
use crate::backup::drill::{self, DrillError, DrillReport};
use crate::backup::incoming::{IncomingHandle, domain_ref};
use crate::ops::{EventKind, Work};

impl Registry {
    /// Starts the last epoch of a copy in isolation and says what came of it, leaving nothing. One at a time on this host.
    ///
    /// # Errors
    /// [`DrillError`].
    pub async fn drill(
        &self,
        handle: &IncomingHandle,
        run_for: Duration,
        work: &Work,
    ) -> Result<DrillReport, DrillError> {
        let Ok(_alone) = self.drilling.try_lock() else {
            return Err(DrillError::Refused("another drill runs on this host; `remus jobs` shows it".into()));
        };
        let status = handle.status();
        let (uuid, name) = (status.offer.protection, status.offer.domain.clone());
        drill::check_memory(self.host.as_ref(), status.offer.max_memory_kib).await?;
        let material = handle.drill().await.map_err(|error| DrillError::Refused(error.to_string()))?;
        let banner = self.settings.banner_patience;
        let result = drill::run(&self.host, self.receivers.as_ref(), material, run_for, banner, work).await;
        let told = match &result {
            Ok(report) => Some((
                EventKind::Drilled,
                format!(
                    "epoch {} would start: built in {} ms, ran {} ms in isolation, answered after {} ms",
                    report.epoch,
                    report.copied_ms + report.built_ms,
                    report.ran_ms,
                    report.answered_ms
                ),
            )),
            Err(DrillError::Failed(text)) => Some((EventKind::DrillFailed, text.clone())),
            Err(_) => None,
        };
        if let Some((kind, text)) = told {
            self.events.publish(domain_ref(uuid, &name, status.domid), kind, text);
        }
        result
    }
}
