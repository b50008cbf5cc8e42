//! Moves captured items to the peer while the guest runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::peer::{EpochEnd, Outlet, PeerLost};
use crate::audit::{self, Held, Sample};
use crate::capture::ItemReceiver;
use crate::ids::Epoch;
use crate::stream::digest::Digester;
use crate::stream::{CaptureItem, PAGE_SIZE, Record};

/// What the driver tells the pump, in this order for each epoch.
#[derive(Debug)]
pub enum PumpOrder {
    /// An epoch's items follow.
    Begin {
        /// Which.
        epoch: Epoch,
        /// Whether it is armed.
        armed: bool,
        /// The pages that the audit reads meanwhile.
        audited: BTreeSet<u64>,
    },
    /// The guest runs again.
    Finish {
        /// These records (the device model's) complete the epoch.
        records: Vec<Record>,
        /// What the audit has read.
        audit: Option<Sample>,
    },
}

/// What the pump tells the driver.
#[derive(Debug, PartialEq, Eq)]
pub enum PumpEvent {
    /// All of the epoch is handed to the transport.
    Sent {
        /// Which.
        epoch: Epoch,
        /// What it cost.
        cost: EpochCost,
    },
    /// The peer is lost.
    PeerLost(String),
    /// The capture broke.
    CaptureFailed(String),
}

/// What one epoch cost the pump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EpochCost {
    /// Pages of which the contents were sent: not those that the guest merely has no memory at.
    pub pages: u64,
    /// Bytes handed to the transport.
    pub bytes: u64,
    /// Time spent on digests.
    pub encode: Duration,
    /// When its first item was taken from the capture.
    pub began: Option<Instant>,
    /// From the order to finish until all was handed over.
    pub finish: Duration,
}

/// Pages and bytes sent so far, for progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages of which the contents were sent.
    pub pages: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The pump: owns the receiving end of the capture and the data path to the peer.
pub struct Pump {
    /// Where items come from.
    pub items: ItemReceiver,
    /// Where they go.
    pub outlet: Box<dyn Outlet>,
    /// What to do.
    pub orders: mpsc::Receiver<PumpOrder>,
    /// What was done.
    pub events: mpsc::UnboundedSender<PumpEvent>,
    /// How far it is.
    pub sent: watch::Sender<Sent>,
    /// The pages that the peer has, for the audit.
    pub held: Arc<Mutex<Held>>,
}

impl Pump {
    /// Runs until the driver drops its end of `orders`, or the capture or the peer fails. After a failure it goes on taking items
    /// and throws them away: the engine, and with it the guest, must never wait for a peer that is gone (R6).
    pub async fn run(mut self) {
        while let Some(order) = self.orders.recv().await {
            let PumpOrder::Begin { epoch, armed, audited } = order else { continue };
            match self.epoch(epoch, armed, &audited).await {
                Ok(Some(cost)) => {
                    let _ = self.events.send(PumpEvent::Sent { epoch, cost });
                }
                Ok(None) => return,
                Err(failure) => {
                    let _ = self.events.send(failure);
                    break;
                }
            }
        }
        while let Ok(Some(_)) = self.items.recv().await {}
    }

    async fn epoch(
        &mut self,
        epoch: Epoch,
        armed: bool,
        audited: &BTreeSet<u64>,
    ) -> Result<Option<EpochCost>, PumpEvent> {
        let mut dirty = BTreeSet::new();
        let mut cost = EpochCost::default();
        let mut digester = Digester::new();
        let (mut entries, mut records, mut bytes) = (0, 0, 0);
        let lost = |PeerLost(text)| PumpEvent::PeerLost(text);
        if epoch == Epoch(0) {
            // The static part comes before the first epoch.
            match self.items.recv().await {
                Ok(Some(CaptureItem::Preamble(bytes))) => self.outlet.preamble(bytes).await.map_err(lost)?,
                Ok(Some(_)) => {
                    return Err(PumpEvent::CaptureFailed("the capture did not begin with its preamble".into()));
                }
                Ok(None) => return Ok(None),
                Err(error) => return Err(PumpEvent::CaptureFailed(error.to_string())),
            }
        }
        self.outlet.begin(epoch, armed).await.map_err(lost)?;
        loop {
            match self.items.recv().await {
                Ok(Some(CaptureItem::Preamble(_))) => {
                    return Err(PumpEvent::CaptureFailed("the capture has a second preamble".into()));
                }
                Ok(Some(CaptureItem::Pages(batch))) => {
                    let start = Instant::now();
                    cost.began.get_or_insert(start);
                    digester.pages(&batch);
                    bytes += batch.data.len() as u64;
                    cost.encode += start.elapsed();
                    self.held.lock().unwrap_or_else(PoisonError::into_inner).sent(&batch);
                    if !audited.is_empty() {
                        dirty.extend(audit::gfns(&batch).filter(|gfn| audited.contains(gfn)));
                    }
                    entries += batch.entries.len() as u64;
                    let pages = (batch.data.len() / PAGE_SIZE) as u64;
                    cost.pages += pages;
                    let sent_bytes = self.outlet.pages(epoch, batch).await.map_err(lost)?;
                    cost.bytes += sent_bytes;
                    self.sent.send_modify(|sent| {
                        sent.pages += pages;
                        sent.bytes += sent_bytes;
                    });
                }
                Ok(Some(CaptureItem::State(record))) => {
                    cost.began.get_or_insert_with(Instant::now);
                    digester.record(&record);
                    records += 1;
                    bytes += record.body.len() as u64;
                    cost.bytes += self.outlet.record(epoch, record).await.map_err(lost)?;
                }
                Ok(Some(CaptureItem::EndOfEpoch)) => break,
                Ok(None) => return Ok(None),
                Err(error) => return Err(PumpEvent::CaptureFailed(error.to_string())),
            }
        }
        let Some(PumpOrder::Finish { records: extra, audit }) = self.orders.recv().await else { return Ok(None) };
        let start = Instant::now();
        for record in extra {
            digester.record(&record);
            records += 1;
            bytes += record.body.len() as u64;
            cost.bytes += self.outlet.record(epoch, record).await.map_err(lost)?;
        }
        let end = EpochEnd { epoch, armed, digest: digester.finish(), pages: entries, bytes, records };
        self.outlet.end(end).await.map_err(lost)?;
        if let Some(mut sample) = audit {
            sample.keep_clean(&dirty, audit::PAGES_PER_EPOCH);
            self.outlet.audit(sample).await.map_err(lost)?;
        }
        cost.finish = start.elapsed();
        Ok(Some(cost))
    }
}

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;
