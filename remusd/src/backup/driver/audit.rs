//! The audit's half on the backup (rule R7).

use std::sync::Arc;

use super::{Driver, Input};
use crate::audit::Check;
use crate::backup::machine::{Event, State};
use crate::ids::Epoch;
use crate::ops::EventKind;
use crate::xen::PageHash;

impl Driver {
    /// The receiver has read all of this epoch: reads what can be compared now.
    pub(super) fn begin_audit(&mut self, drained: Epoch) {
        let Some(domid) = self.status.borrow().domid.filter(|_| self.machine.state() == State::Armed) else { return };
        let Some(check) = self.comparer.drained(drained) else { return };
        let (host, tell) = (Arc::clone(&self.host), self.tell.clone());
        tokio::spawn(async move {
            let read = host.page_hashes(domid, check.gfns.clone()).await.map_err(|error| error.to_string());
            // The protection may have ended meanwhile.
            let _ = tell.send(Input::Audited(check, read));
        });
    }

    pub(super) fn end_audit(&mut self, check: &Check, read: Result<Vec<Option<PageHash>>, String>) {
        let report = match read {
            Ok(hashes) => self.comparer.read(check, &hashes),
            Err(error) => {
                if !self.unread_told {
                    self.unread_told = true;
                    let text =
                        format!("the audit cannot read the copy's pages, so nobody would notice a wrong one: {error}");
                    self.publish(EventKind::Degraded, text);
                }
                self.comparer.unread(check);
                None
            }
        };
        let Some(report) = report else { return };
        if report.differ.is_empty() {
            tracing::debug!(epoch = report.epoch.0, compared = report.compared, skipped = report.skipped, "audit");
            return;
        }
        self.publish(EventKind::AuditDiffers, report.to_string());
        // With the primary at hand the copy is made anew. Without, it is all there is: an operator has been told.
        if self.machine.state() == State::Armed {
            self.step(Event::ReceiverDied(report.to_string()));
        }
    }
}
