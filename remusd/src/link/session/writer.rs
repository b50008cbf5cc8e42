//! Writes frames, control before data.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{Control, Data, LAST_FRAMES, Report, Shared, wall_clock_ms};
use crate::link::codec::Encoder;
use crate::link::error::CloseReason;
use crate::link::frame::{Frame, Heartbeat};

pub(super) struct Writer {
    pub(super) stream: Box<dyn AsyncWrite + Send + Unpin>,
    pub(super) encoder: Encoder,
    pub(super) control: mpsc::Receiver<Control>,
    pub(super) data: mpsc::UnboundedReceiver<Data>,
    pub(super) report: watch::Receiver<Report>,
    pub(super) heartbeat: Duration,
    pub(super) room: Arc<Semaphore>,
    pub(super) shared: Arc<Shared>,
    /// Tells the reader that nothing more will be written.
    pub(super) done: CancellationToken,
}

impl Writer {
    pub(super) async fn run(mut self) {
        let reason = self.write_all().await;
        self.room.close();
        // Closing our half lets the peer see the end; if the stream is broken already there is nothing to add.
        let _ = tokio::time::timeout(LAST_FRAMES, self.stream.shutdown()).await;
        if let Some(reason) = reason {
            // An error in writing is held back until the reader has seen what the peer said last.
            let broken = matches!(reason, CloseReason::Io(_));
            let _ = self.shared.reason.set(reason);
            if !broken {
                self.shared.closed.cancel();
            }
        }
        self.done.cancel();
    }

    /// Writes until the session ends; `None` if somebody else ended it.
    async fn write_all(&mut self) -> Option<CloseReason> {
        let shared = Arc::clone(&self.shared);
        let mut timer = tokio::time::interval(self.heartbeat);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beaten = Instant::now();
        let mut bytes = BytesMut::new();
        loop {
            let mut is_data = false;
            let frame = tokio::select! {
                biased;
                () = shared.closed.cancelled() => return None,
                _ = timer.tick() => {
                    let late = beaten.elapsed() > self.heartbeat * 2;
                    beaten = Instant::now();
                    let report = *self.report.borrow();
                    let heard = shared.detector().silence(Shared::now());
                    Frame::Heartbeat(heartbeat(report, late, heard))
                }
                item = self.control.recv() => match item {
                    Some(Control::Frame(frame)) => frame,
                    Some(Control::Close) | None => return Some(CloseReason::Local),
                },
                // Its room is free again from here on: at most one more frame is in memory.
                Some(data) = self.data.recv() => {
                    is_data = true;
                    data.frame
                }
            };
            bytes.clear();
            if let Err(error) = self.encoder.encode(&frame, &mut bytes) {
                return Some(CloseReason::Protocol(error));
            }
            drop(frame);
            let written = tokio::select! {
                // An end of the session must not wait for a peer that does not read.
                () = shared.closed.cancelled() => return None,
                written = async {
                    self.stream.write_all(&bytes).await?;
                    self.stream.flush().await
                } => written,
            };
            if let Err(error) = written {
                return Some(CloseReason::Io(error.to_string()));
            }
            if is_data {
                shared.acks().progress(Shared::now());
            }
        }
    }
}

pub(super) fn heartbeat(report: Report, late: bool, heard: Duration) -> Heartbeat {
    let since_resume = report.resumed_at.map_or(Duration::ZERO, |at| at.elapsed());
    Heartbeat {
        epoch: report.epoch,
        guest: report.guest,
        since_resume_ms: u64::try_from(since_resume.as_millis()).unwrap_or(u64::MAX),
        wall_clock_ms: wall_clock_ms(),
        late,
        heard_ms: u32::try_from(heard.as_millis()).unwrap_or(u32::MAX),
    }
}
