//! Reads frames and tells how the stream ended.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{LAST_FRAMES, SessionEvent, Shared};
use crate::link::child::ChildGroup;
use crate::link::codec::Decoder;
use crate::link::detector::Verdict;
use crate::link::error::{CloseReason, FrameError};
use crate::link::frame::Frame;
use crate::link::handshake::with_last_words;
use crate::link::pages::{PageDecoder, PagesError};
use crate::link::transport::Connection;

pub(super) struct Reader {
    pub(super) stream: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) decoder: Decoder,
    pub(super) pages: Option<PageDecoder>,
    pub(super) events: mpsc::Sender<SessionEvent>,
    pub(super) shared: Arc<Shared>,
    pub(super) child: Option<ChildGroup>,
    pub(super) written: CancellationToken,
}

impl Reader {
    pub(super) async fn run(mut self) {
        let seen = self.read_all().await;
        let reason = match (self.shared.reason.get(), seen) {
            (Some(CloseReason::Local), _) => CloseReason::Local,
            // How the peer's stream ended is more telling than that our write failed.
            (Some(first), CloseReason::Local) => first.clone(),
            (_, seen) => seen,
        };
        let reason = match reason {
            CloseReason::Local => reason,
            _ => with_last_words(reason, Connection::last_words(&mut self.child).await),
        };
        if let CloseReason::Protocol(error) = &reason {
            tracing::warn!(%error, "the link is closed");
        }
        self.shared.close(reason.clone());
        // The writer flushes within its own bound; the transport must live until then.
        let _ = tokio::time::timeout(2 * LAST_FRAMES, self.written.cancelled()).await;
        drop(self.child.take());
        let _ = self.events.send(SessionEvent::Closed(reason)).await;
    }

    async fn read_all(&mut self) -> CloseReason {
        let shared = Arc::clone(&self.shared);
        let events = self.events.clone();
        let written = self.written.clone();
        let give_up = async move {
            written.cancelled().await;
            tokio::time::sleep(LAST_FRAMES).await;
        };
        tokio::pin!(give_up);
        loop {
            loop {
                match self.decoder.next_frame() {
                    Ok(Some(Frame::Error { code, text })) => {
                        return CloseReason::Peer { code, text };
                    }
                    Ok(Some(frame)) => {
                        let frame = match decoded(&mut self.pages, frame) {
                            Ok(frame) => frame,
                            Err(error) => return CloseReason::Protocol(error),
                        };
                        let ends = matches!(frame, Frame::EpochEnd(_));
                        if let Some(end) = self.deliver(frame).await {
                            return end;
                        }
                        // Only the next epoch needs it, and the acknowledgement of this one should not wait for it.
                        if let Some(pages) = self.pages.as_mut().filter(|_| ends) {
                            pages.commit();
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return CloseReason::Protocol(error),
                }
            }
            let read = tokio::select! {
                biased;
                () = shared.closed.cancelled() => return CloseReason::Local,
                () = events.closed() => return CloseReason::Local,
                () = &mut give_up => return CloseReason::Local,
                read = self.stream.read_buf(self.decoder.buffer()) => read,
            };
            match read {
                Ok(0) => {
                    return match self.decoder.finish() {
                        Ok(()) => CloseReason::Eof,
                        Err(error) => CloseReason::Protocol(error),
                    };
                }
                Ok(_) => {
                    let verdict = shared.detector().heard(Shared::now());
                    if verdict == Some(Verdict::Alive) && events.send(SessionEvent::Alive).await.is_err() {
                        return CloseReason::Local;
                    }
                }
                Err(error) => return CloseReason::Io(error.to_string()),
            }
        }
    }

    /// Hands a frame on. While the consumer makes us wait, silence is our own doing.
    async fn deliver(&mut self, mut frame: Frame) -> Option<CloseReason> {
        match &mut frame {
            Frame::Ack { epoch, .. } => self.shared.acks().acked(*epoch, Shared::now()),
            Frame::Heartbeat(beat) => {
                // A thawed host finds the heartbeats of its freeze: that it was silent is true, and says nothing of the link (F22).
                let awake = self.shared.detector().awake(Shared::now()).as_millis();
                beat.heard_ms = beat.heard_ms.min(u32::try_from(awake).unwrap_or(u32::MAX));
            }
            _ => {}
        }
        match self.events.try_send(SessionEvent::Frame(frame)) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Closed(_)) => Some(CloseReason::Local),
            Err(mpsc::error::TrySendError::Full(event)) => {
                self.shared.detector().set_reading(false, Shared::now());
                let sent = tokio::select! {
                    sent = self.events.send(event) => sent.is_ok(),
                    () = self.shared.closed.cancelled() => false,
                };
                self.shared.detector().set_reading(true, Shared::now());
                (!sent).then_some(CloseReason::Local)
            }
        }
    }
}

/// Turns coded pages into pages. What both sides remember advances only where an epoch ends (DESIGN R2, hazard F18).
fn decoded(pages: &mut Option<PageDecoder>, frame: Frame) -> Result<Frame, FrameError> {
    let Some(decoder) = pages else { return Ok(frame) };
    match frame {
        Frame::EpochBegin { .. } => decoder.begin(),
        Frame::CodedPages { epoch, body } => {
            let malformed = |error: PagesError| FrameError::Malformed { kind: "CODED_PAGES", what: error.0 };
            return Ok(Frame::Pages { epoch, batch: decoder.decode(body).map_err(malformed)? });
        }
        _ => {}
    }
    Ok(frame)
}
