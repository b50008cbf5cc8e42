//! The link to the backup's `remusd`.

use std::sync::Mutex;
use tokio::time::Instant;

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::sleep::Sleep;
use crate::audit::Sample;
use crate::ids::Epoch;
use crate::link::pages::{Effort, PageEncoder};
use crate::link::{self, LinkEvent, LinkEvents, LinkSender, StopReason, Token};
use crate::protect::machine::{GuestEnd, StopWhy};
use crate::protect::peer::{EpochEnd, GuestDoes, Outlet, PeerControl, PeerEvent, PeerLost};
use crate::stream::{PageBatch, Record};

/// The data path.
#[derive(Debug)]
pub struct LinkOutlet {
    sender: LinkSender,
    /// What encodes pages against those that the peer remembers. Away while it works.
    encoder: Option<PageEncoder>,
}

impl LinkOutlet {
    /// Over this sender; pages are coded if the peer can decode them.
    #[must_use]
    pub fn new(sender: LinkSender) -> Self {
        let encoder = sender.page_cache().map(PageEncoder::new);
        Self { sender, encoder }
    }
}

impl From<link::LinkError> for PeerLost {
    fn from(error: link::LinkError) -> Self {
        Self(error.to_string())
    }
}

#[async_trait]
impl Outlet for LinkOutlet {
    async fn preamble(&mut self, bytes: bytes::Bytes) -> Result<(), PeerLost> {
        Ok(self.sender.preamble(bytes).await?)
    }

    async fn begin(&mut self, epoch: Epoch, armed: bool) -> Result<(), PeerLost> {
        if let Some(encoder) = &mut self.encoder {
            encoder.begin();
        }
        Ok(self.sender.epoch_begin(epoch, armed).await?)
    }

    async fn pages(&mut self, epoch: Epoch, batch: PageBatch) -> Result<u64, PeerLost> {
        let Some(mut encoder) = self.encoder.take() else {
            let size = batch.size() as u64;
            self.sender.pages(epoch, batch).await?;
            return Ok(size);
        };
        // On a link that takes what comes, LZ4 would be the narrow place.
        let effort = if self.sender.congested() { Effort::Dense } else { Effort::Fast };
        let (encoder, parts) = tokio::task::spawn_blocking(move || {
            let parts = encoder.encode(&batch, effort);
            (encoder, parts)
        })
        .await
        .map_err(|error| PeerLost(format!("encoding pages failed: {error}")))?;
        self.encoder = Some(encoder);
        let mut size = 0;
        for part in parts {
            size += part.len() as u64;
            self.sender.coded_pages(epoch, part).await?;
        }
        Ok(size)
    }

    async fn record(&mut self, epoch: Epoch, record: Record) -> Result<u64, PeerLost> {
        let size = record.body.len() as u64;
        self.sender.state(epoch, record).await?;
        Ok(size)
    }

    async fn end(&mut self, end: EpochEnd) -> Result<(), PeerLost> {
        self.sender.epoch_end(end).await?;
        // Only the next epoch needs it: output waits for the other side's acknowledgement meanwhile.
        if let Some(encoder) = &mut self.encoder {
            encoder.commit();
        }
        Ok(())
    }

    async fn audit(&mut self, sample: Sample) -> Result<(), PeerLost> {
        Ok(self.sender.audit(sample).await?)
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::ids::{Generation, Nonce, SessionKey};
    use crate::link::handshake::Incoming;
    use crate::link::session::SessionEvent;
    use crate::link::transport::Connection;
    use crate::link::{Frame, LinkOptions, PrimaryLink, ProtectOffer};
    use crate::stream::PAGE_SIZE;
    use crate::stream::digest::Digester;

    fn offer() -> ProtectOffer {
        // Room for two epochs of the batch below.
        ProtectOffer { max_memory_kib: 4096, detection_ms: 10_000, ..ProtectOffer::example() }
    }

    fn batch(fill: impl Fn(u64) -> u8) -> PageBatch {
        let entries: Vec<u64> = (0..300).collect();
        let data: Vec<u8> =
            entries.iter().flat_map(|gfn| [[1; PAGE_SIZE - 1].as_slice(), &[fill(*gfn)]].concat()).collect();
        PageBatch { entries, data: Bytes::from(data) }
    }

    /// Two epochs over a whole session: the second is a small part of the first on the wire, and both arrive as they were.
    #[tokio::test]
    async fn later_epochs_are_sent_as_what_has_changed() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let key = SessionKey { generation: Generation(1), nonce: Nonce(uuid::Uuid::from_u128(3)) };
        let options = LinkOptions::default();
        let accept = async {
            let incoming = Incoming::accept(Connection::new(theirs), options.handshake_timeout).await.unwrap();
            incoming.welcome(uuid::Uuid::nil(), false, &options).await.unwrap()
        };
        let (opened, mut session) =
            tokio::join!(PrimaryLink::over(Connection::new(ours), "b", key, offer(), &options), accept);
        let (sender, _events) = opened.unwrap();
        assert!(sender.page_cache().is_some());
        let mut outlet = LinkOutlet::new(sender);
        let receive = async move {
            let mut epochs = Vec::new();
            let mut digester = Digester::new();
            while epochs.len() < 2 {
                match session.events.recv().await.unwrap() {
                    SessionEvent::Frame(Frame::Pages { batch, .. }) => digester.pages(&batch),
                    SessionEvent::Frame(Frame::EpochEnd(_)) => epochs.push(digester.finish()),
                    SessionEvent::Frame(Frame::EpochBegin { .. } | Frame::Heartbeat(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
            epochs
        };
        let send = async {
            let (mut sizes, mut digests) = (Vec::new(), Vec::new());
            for epoch in 0..2u64 {
                let sent = batch(|gfn| (gfn + epoch) as u8);
                let mut digester = Digester::new();
                digester.pages(&sent);
                outlet.begin(Epoch(epoch), false).await.unwrap();
                sizes.push(outlet.pages(Epoch(epoch), sent).await.unwrap());
                let digest = digester.finish();
                digests.push(digest);
                let end = EpochEnd { epoch: Epoch(epoch), armed: false, digest, pages: 300, bytes: 0, records: 0 };
                outlet.end(end).await.unwrap();
            }
            (sizes, digests)
        };
        let ((sizes, digests), arrived) = tokio::join!(send, receive);
        assert_eq!(arrived, digests);
        assert!(sizes[0] > 300 * PAGE_SIZE as u64 && sizes[1] * 50 < sizes[0], "{sizes:?}");
    }
}
