//! The link to the backup's `remusd`.

use std::sync::Mutex;
use tokio::time::Instant;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::sleep::Sleep;
use crate::audit::Sample;
use crate::ids::Epoch;
use crate::link::{self, LinkEvent, LinkEvents, LinkSender, StopReason, Token};
use crate::protect::machine::{GuestEnd, StopWhy};
use crate::protect::peer::{EpochEnd, GuestDoes, Outlet, PeerControl, PeerEvent, PeerLost};
use crate::stream::{PageBatch, Record};

/// The data path.
#[derive(Debug)]
pub struct LinkOutlet(pub LinkSender);

impl From<link::LinkError> for PeerLost {
    fn from(error: link::LinkError) -> Self {
        Self(error.to_string())
    }
}

#[async_trait]
impl Outlet for LinkOutlet {
    async fn preamble(&mut self, bytes: bytes::Bytes) -> Result<(), PeerLost> {
        Ok(self.0.preamble(bytes).await?)
    }

    async fn begin(&mut self, epoch: Epoch, armed: bool) -> Result<(), PeerLost> {
        Ok(self.0.epoch_begin(epoch, armed).await?)
    }

    async fn pages(&mut self, epoch: Epoch, batch: PageBatch) -> Result<u64, PeerLost> {
        let size = batch.size() as u64;
        self.0.pages(epoch, batch).await?;
        Ok(size)
    }

    async fn record(&mut self, epoch: Epoch, record: Record) -> Result<u64, PeerLost> {
        let size = record.body.len() as u64;
        self.0.state(epoch, record).await?;
        Ok(size)
    }

    async fn end(&mut self, end: EpochEnd) -> Result<(), PeerLost> {
        Ok(self.0.epoch_end(end).await?)
    }

    async fn audit(&mut self, sample: Sample) -> Result<(), PeerLost> {
        Ok(self.0.audit(sample).await?)
    }
}

/// The control path.
#[derive(Debug)]
pub struct LinkControl {
    sender: LinkSender,
    resumed_at: Mutex<Option<Instant>>,
}

impl LinkControl {
    /// Over this sender.
    #[must_use]
    pub fn new(sender: LinkSender) -> Self {
        Self { sender, resumed_at: Mutex::new(Some(Instant::now())) }
    }
}

#[async_trait]
impl PeerControl for LinkControl {
    async fn stop(&self, why: &StopWhy) {
        let reason = match why {
            StopWhy::Planned => StopReason::Planned,
            StopWhy::Failed(_) => StopReason::Failed,
            StopWhy::GuestEnded(GuestEnd::Poweroff) => StopReason::Poweroff,
            StopWhy::GuestEnded(GuestEnd::Reboot) => StopReason::Reboot,
            StopWhy::GuestEnded(GuestEnd::Crash | GuestEnd::Watchdog) => StopReason::Crash,
            StopWhy::GuestEnded(GuestEnd::Gone) => StopReason::Destroyed,
        };
        // A closed link is reported by its own event.
        let _ = self.sender.stop(reason);
    }

    async fn token(&self, seq: u64, token: Token) {
        let _ = self.sender.token(seq, token);
    }

    async fn hand_over(&self, epoch: Epoch, token: Token) {
        let _ = self.sender.hand_over(epoch, token);
    }

    fn guest_does(&self, epoch: Epoch, does: GuestDoes) {
        let mut resumed_at = self.resumed_at.lock().expect("no panic while locked");
        let guest = match does {
            GuestDoes::Runs => {
                *resumed_at = Some(Instant::now());
                link::GuestState::Running
            }
            GuestDoes::Stuck => link::GuestState::Stuck,
            GuestDoes::Suspended => link::GuestState::Suspended,
            GuestDoes::Ended => link::GuestState::Shutdown,
        };
        self.sender.report(link::session::Report { epoch, guest, resumed_at: *resumed_at });
    }

    async fn close(&self) {
        self.sender.close();
    }
}

/// Turns the link's events into the driver's until the link has ended. If this host has slept, a loss is told only when `asked`, which may
/// take a while, does not say that the copy runs.
pub async fn relay(
    mut from: LinkEvents,
    to: mpsc::UnboundedSender<PeerEvent>,
    mut sleep: Sleep,
    asked: impl AsyncFn() -> Option<String>,
) {
    while let Some(event) = from.next().await {
        let now = tokio::time::Instant::now().into_std();
        sleep.heard(now);
        let event = match event {
            LinkEvent::Suspect { .. } | LinkEvent::Closed(_)
                if sleep.doubts(now)
                    && let Some(text) = asked().await =>
            {
                PeerEvent::Superseded(text)
            }
            LinkEvent::Ack { epoch, .. } => PeerEvent::Ack(epoch),
            LinkEvent::BackupLost { text, .. } => PeerEvent::Lost(format!("the backup cannot hold the copy: {text}")),
            LinkEvent::Superseded { text } => PeerEvent::Superseded(text),
            LinkEvent::Stopped => PeerEvent::Stopped,
            LinkEvent::TokenAck { seq } => PeerEvent::TokenAck(seq),
            LinkEvent::HandoverFailed { text } => PeerEvent::HandoverFailed(text),
            LinkEvent::Suspect { silence } => {
                PeerEvent::Lost(format!("nothing was heard from the backup for {} ms", silence.as_millis()))
            }
            LinkEvent::AckLate(late) => {
                tracing::warn!(
                    epoch = late.epoch.0,
                    waited_ms = late.waited.as_millis() as u64,
                    "acknowledgement is late"
                );
                PeerEvent::AckLate
            }
            LinkEvent::Closed(reason) => PeerEvent::Lost(format!("the link to the backup has ended: {reason}")),
            LinkEvent::Heartbeat(beat) => PeerEvent::Beat(beat),
            LinkEvent::Starved { by } => {
                sleep.starved(by, now);
                PeerEvent::Starved(by)
            }
            LinkEvent::Alive => continue,
        };
        if to.send(event).is_err() {
            return;
        }
    }
}
