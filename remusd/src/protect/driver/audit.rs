//! The audit's half on the primary (rule R7): while the engine copies, other pages are read; what comes too late is thrown away.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::Driver;
use crate::audit::{Chooser, Held, PAGES_PER_EPOCH, Sample};
use crate::ids::{Epoch, Nonce};

/// Longest wait for the reading once the engine has copied, as a part of the pause deadline: the guest stands still. What was read after
/// its resume would be worthless.
const PATIENCE: u32 = 100;
/// Not less than this: 32 pages take some hundred microseconds on hardware.
const LEAST: Duration = Duration::from_millis(5);

/// What the audit of one protection is made of.
pub(super) struct Audit {
    pub(super) held: Arc<Mutex<Held>>,
    chooser: Chooser,
    reading: Option<JoinHandle<Option<Sample>>>,
}

impl Audit {
    pub(super) fn new(nonce: Nonce) -> Self {
        Self { held: Arc::default(), chooser: Chooser::new(nonce), reading: None }
    }

    /// Twice as many as are wanted: some will turn out to be dirty.
    fn choose(&self, epoch: Epoch) -> Vec<u64> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.chooser.choose(&held, epoch, 2 * PAGES_PER_EPOCH)
    }
}

impl Driver {
    /// The guest stands still: begins to read. Returns which pages.
    pub(super) fn begin_audit(&mut self) -> BTreeSet<u64> {
        // One that came too late is of the past.
        self.audit.reading = None;
        let (epoch, domid) = (self.current.epoch, self.parts.domid);
        let Some(pages) = self.parts.pages.clone().filter(|_| self.current.armed && !self.parts.self_acknowledging)
        else {
            return BTreeSet::new();
        };
        let gfns = self.audit.choose(epoch);
        let audited = gfns.iter().copied().collect();
        self.audit.reading = Some(tokio::spawn(async move {
            let start = std::time::Instant::now();
            match pages.hashes(domid, gfns.clone()).await {
                Ok(hashes) => {
                    let sample = Sample::of(epoch, &gfns, &hashes);
                    tracing::trace!(pages = sample.pages.len(), us = start.elapsed().as_micros() as u64, "audit read");
                    Some(sample)
                }
                Err(error) => {
                    tracing::warn!(%domid, "the audit cannot read the guest's pages: {error}");
                    None
                }
            }
        }));
        audited
    }

    /// The guest is about to be let go: takes what was read.
    pub(super) async fn end_audit(&mut self) {
        if let Some(reading) = self.audit.reading.take() {
            let patience = Duration::from_millis(self.parts.options.pause_deadline_ms) / PATIENCE;
            match tokio::time::timeout(patience.max(LEAST), reading).await {
                Ok(read) => self.current.audit = read.ok().flatten(),
                Err(_) => tracing::debug!(epoch = self.current.epoch.0, "the audit came too late for this epoch"),
            }
        }
    }
}
