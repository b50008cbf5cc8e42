//! Drives an open session over any stream: one task reads, one writes, one watches the clock.
//!
//! Control frames (heartbeats, acknowledgements, endings) go before data (configuration, pages, state, epoch ends) and never
//! wait for room; data is bounded in bytes and waits. A heartbeat is made when it is written, so it is never stale.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{
    child::ChildGroup,
    codec::{Decoder, Encoder},
    detector::{AckLate, AckWatch, Detector, Verdict},
    error::{CloseReason, LinkError},
    frame::{Frame, GuestState, Heartbeat},
    handshake::with_last_words,
    transport::Connection,
};
use crate::ids::Epoch;

/// Received frames that wait for their consumer; at 256 KiB each this is 8 MiB.
const EVENTS: usize = 32;
/// Control frames that may wait for the writer. More means that the peer has stopped reading for good.
const CONTROL: usize = 1024;
/// How long we go on reading after writing has failed: the peer's last frame says why it closed.
const LAST_FRAMES: Duration = Duration::from_secs(1);

/// Settings of one end of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkOptions {
    /// Between heartbeats. At most a third of `detection`.
    pub heartbeat: Duration,
    /// Silence after which the peer is suspected.
    pub detection: Duration,
    /// Time without progress after which an unacknowledged epoch is suspicious.
    pub ack_deadline: Duration,
    /// Most bytes of data that wait to be written.
    pub data_queue: usize,
    /// Most time for the handshake. Ssh's own connect takes part of it.
    pub handshake_timeout: Duration,
}

impl LinkOptions {
    /// Options that follow from a detection time.
    #[must_use]
    pub fn for_detection(detection: Duration) -> Self {
        Self {
            heartbeat: (detection / 5).max(Duration::from_millis(10)),
            detection,
            ack_deadline: detection * 2,
            data_queue: 8 * 1024 * 1024,
            handshake_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self::for_detection(Duration::from_secs(1))
    }
}

/// What the next heartbeat tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The primary's current epoch, or the backup's newest complete one.
    pub epoch: Epoch,
    /// What the guest is doing.
    pub guest: GuestState,
    /// When the guest was last resumed.
    pub resumed_at: Option<Instant>,
}

impl Default for Report {
    fn default() -> Self {
        Self { epoch: Epoch(0), guest: GuestState::Unknown, resumed_at: None }
    }
}

/// What a session tells its consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// A frame came in. `ERROR` is not among them: it closes.
    Frame(Frame),
    /// Nothing was heard for the detection time. The session stays open.
    Suspect {
        /// How long nothing was heard.
        silence: Duration,
    },
    /// A suspected peer was heard again.
    Alive,
    /// An ended epoch is not acknowledged and nothing moves.
    AckLate(AckLate),
    /// The session has ended. The last event.
    Closed(CloseReason),
}

/// This host's wall clock in milliseconds since 1970.
pub(crate) fn wall_clock_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

enum Control {
    Frame(Frame),
    /// Flush what control is queued, then end the session.
    Close,
}

struct Data {
    frame: Frame,
    _room: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
struct Shared {
    detector: Mutex<Detector>,
    acks: Mutex<AckWatch>,
    closed: CancellationToken,
    reason: OnceLock<CloseReason>,
}

impl Shared {
    fn detector(&self) -> MutexGuard<'_, Detector> {
        self.detector.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn acks(&self) -> MutexGuard<'_, AckWatch> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now() -> std::time::Instant {
        Instant::now().into_std()
    }

    fn close(&self, reason: CloseReason) {
        // The first reason counts; what follows from it is not news.
        let _ = self.reason.set(reason);
        self.closed.cancel();
    }
}

/// The sending half of a session. Cheap to clone; the session ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Outbox {
    control: mpsc::Sender<Control>,
    data: mpsc::UnboundedSender<Data>,
    room: Arc<Semaphore>,
    capacity: usize,
    report: Arc<watch::Sender<Report>>,
    shared: Arc<Shared>,
}

impl Outbox {
    /// Queues a frame before all data. Never waits.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the session has ended.
    pub fn control(&self, frame: Frame) -> Result<(), LinkError> {
        self.push(Control::Frame(frame))
    }

    fn push(&self, item: Control) -> Result<(), LinkError> {
        self.control.try_send(item).map_err(|error| {
            if let mpsc::error::TrySendError::Full(_) = error {
                let text = format!("the peer has not read for {CONTROL} control frames");
                self.shared.close(CloseReason::Io(text));
            }
            LinkError::Closed
        })
    }

    /// Queues a data frame of about `size` bytes; waits for room.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the session has ended, also while waiting.
    pub async fn data(&self, frame: Frame, size: usize) -> Result<(), LinkError> {
        let permits = u32::try_from(size.clamp(1, self.capacity)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(permits).await.map_err(|_| LinkError::Closed)?;
        if let Frame::EpochEnd(end) = &frame {
            self.shared.acks().ended(end.epoch, Shared::now());
        }
        let data = Data { frame, _room: Some(room) };
        self.data.send(data).map_err(|_| LinkError::Closed)
    }

    /// Sets what the next heartbeat tells.
    pub fn report(&self, report: Report) {
        self.report.send_replace(report);
    }

    /// Ends the session after writing the queued control frames; queued data is dropped.
    pub fn close(&self) {
        // Closed already is as wished.
        let _ = self.push(Control::Close);
    }

    /// Ends once the session has ended, for whatever reason.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
}

/// An open session.
#[derive(Debug)]
pub struct Session {
    /// To send.
    pub outbox: Outbox,
    /// What comes in; ends after [`SessionEvent::Closed`]. Dropping it ends the session.
    pub events: mpsc::Receiver<SessionEvent>,
}

impl Session {
    /// Takes over a stream after its handshake.
    pub(super) fn start(connection: Connection, encoder: Encoder, decoder: Decoder, options: &LinkOptions) -> Self {
        let Connection { reader, writer, child } = connection;
        let now = Shared::now();
        let detector = Detector::new(options.detection, now);
        let period = detector.period();
        let shared = Arc::new(Shared {
            detector: Mutex::new(detector),
            acks: Mutex::new(AckWatch::new(options.ack_deadline, now)),
            closed: CancellationToken::new(),
            reason: OnceLock::new(),
        });
        let (control_in, control) = mpsc::channel(CONTROL);
        let (data_in, data) = mpsc::unbounded_channel();
        let (report_in, report) = watch::channel(Report::default());
        let (events_in, events) = mpsc::channel(EVENTS);
        let capacity = options.data_queue.clamp(1, Semaphore::MAX_PERMITS);
        let room = Arc::new(Semaphore::new(capacity));
        let written = CancellationToken::new();
        tokio::spawn(
            Writer {
                stream: writer,
                encoder,
                control,
                data,
                report,
                heartbeat: options.heartbeat,
                room: Arc::clone(&room),
                shared: Arc::clone(&shared),
                done: written.clone(),
            }
            .run(),
        );
        tokio::spawn(watch_clock(Arc::clone(&shared), events_in.clone(), period));
        tokio::spawn(
            Reader { stream: reader, decoder, events: events_in, shared: Arc::clone(&shared), child, written }.run(),
        );
        Self {
            outbox: Outbox { control: control_in, data: data_in, room, capacity, report: Arc::new(report_in), shared },
            events,
        }
    }
}

async fn watch_clock(shared: Arc<Shared>, events: mpsc::Sender<SessionEvent>, period: Duration) {
    let mut timer = tokio::time::interval(period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shared.closed.cancelled() => return,
            () = events.closed() => return,
            _ = timer.tick() => {}
        }
        let now = Shared::now();
        let verdict = shared.detector().tick(now);
        if let Some(Verdict::Suspect { silence }) = verdict
            && events.send(SessionEvent::Suspect { silence }).await.is_err()
        {
            return;
        }
        let late = shared.acks().tick(now);
        if let Some(late) = late
            && events.send(SessionEvent::AckLate(late)).await.is_err()
        {
            return;
        }
    }
}

struct Writer {
    stream: Box<dyn AsyncWrite + Send + Unpin>,
    encoder: Encoder,
    control: mpsc::Receiver<Control>,
    data: mpsc::UnboundedReceiver<Data>,
    report: watch::Receiver<Report>,
    heartbeat: Duration,
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
    /// Tells the reader that nothing more will be written.
    done: CancellationToken,
}

impl Writer {
    async fn run(mut self) {
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
                    Frame::Heartbeat(heartbeat(report, late))
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

fn heartbeat(report: Report, late: bool) -> Heartbeat {
    let since_resume = report.resumed_at.map_or(Duration::ZERO, |at| at.elapsed());
    Heartbeat {
        epoch: report.epoch,
        guest: report.guest,
        since_resume_ms: u64::try_from(since_resume.as_millis()).unwrap_or(u64::MAX),
        wall_clock_ms: wall_clock_ms(),
        late,
    }
}

struct Reader {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    decoder: Decoder,
    events: mpsc::Sender<SessionEvent>,
    shared: Arc<Shared>,
    child: Option<ChildGroup>,
    written: CancellationToken,
}

impl Reader {
    async fn run(mut self) {
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
                        if let Some(end) = self.deliver(frame).await {
                            return end;
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
    async fn deliver(&mut self, frame: Frame) -> Option<CloseReason> {
        if let Frame::Ack { epoch, .. } = &frame {
            self.shared.acks().acked(*epoch, Shared::now());
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

#[cfg(test)]
mod tests;
