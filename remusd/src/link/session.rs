//! Drives an open session over any stream: one task reads, one writes, one watches the clock.
//!
//! Control frames (heartbeats, acknowledgements, endings) go before data (configuration, pages, state, epoch ends) and never
//! wait for room; data is bounded in bytes and waits. A heartbeat is made when it is written, so it is never stale.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::reader::Reader;
use self::writer::Writer;
use super::codec::{Decoder, Encoder};
use super::detector::{AckLate, AckWatch, Detector, Verdict};
use super::error::{CloseReason, LinkError};
use super::frame::{Frame, GuestState};
use super::pages::PageDecoder;
use super::transport::Connection;
use crate::ids::Epoch;

mod reader;
mod writer;

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
    /// Our own clock's task came so late that this host was starved or frozen: silence was not counted (hazard F22).
    Starved {
        /// How late.
        by: Duration,
    },
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

/// How many acknowledgement deadlines a queue may stand still. More than one: in the first copy the backup reads no faster than its
/// receiver builds the domain.
const STALLED: u32 = 4;

/// The sending half of a session. Cheap to clone; the session ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Outbox {
    control: mpsc::Sender<Control>,
    data: mpsc::UnboundedSender<Data>,
    room: Arc<Semaphore>,
    capacity: usize,
    /// How long a frame may wait for room: then nothing of the queue has moved for as long.
    stalled: Duration,
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
        let room = Arc::clone(&self.room).acquire_many_owned(permits);
        let Ok(room) = tokio::time::timeout(self.stalled, room).await else {
            // It may still talk, but does not read: no acknowledgement can ever come, and output would be held for as long as TCP has
            // patience (hazard F22).
            self.shared.close(CloseReason::Io(format!("the peer took no data for {} s", self.stalled.as_secs_f32())));
            return Err(LinkError::Closed);
        };
        let room = room.map_err(|_| LinkError::Closed)?;
        if let Frame::EpochEnd(end) = &frame {
            self.shared.acks().ended(end.epoch, Shared::now());
        }
        let data = Data { frame, _room: Some(room) };
        self.data.send(data).map_err(|_| LinkError::Closed)
    }

    /// Whether more than half of the room for data is taken.
    #[must_use]
    pub fn congested(&self) -> bool {
        self.room.available_permits() < self.capacity / 2
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
    /// Takes over a stream after its handshake. `pages` decodes the peer's coded pages, if it may send any.
    pub(super) fn start(
        connection: Connection,
        encoder: Encoder,
        decoder: Decoder,
        pages: Option<PageDecoder>,
        options: &LinkOptions,
    ) -> Self {
        let Connection { reader, writer, child } = connection;
        let now = Shared::now();
        let detector = Detector::new(options.detection, now);
        // The acknowledgement's watch must tick well within its own limit too, or it takes each tick for a late one.
        let period = detector.period().min(options.ack_deadline / 8).max(Duration::from_millis(5));
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
            Reader { stream: reader, decoder, pages, events: events_in, shared: Arc::clone(&shared), child, written }
                .run(),
        );
        Self {
            outbox: Outbox {
                control: control_in,
                data: data_in,
                room,
                capacity,
                stalled: options.ack_deadline * STALLED,
                report: Arc::new(report_in),
                shared,
            },
            events,
        }
    }
}

async fn watch_clock(shared: Arc<Shared>, events: mpsc::Sender<SessionEvent>, period: Duration) {
    let mut timer = tokio::time::interval(period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ticked = Shared::now();
    loop {
        tokio::select! {
            () = shared.closed.cancelled() => return,
            () = events.closed() => return,
            _ = timer.tick() => {}
        }
        let now = Shared::now();
        let since_tick = now.saturating_duration_since(std::mem::replace(&mut ticked, now));
        // Not worth waiting for a consumer that is busy: that would make the next tick late.
        if shared.detector().starved(since_tick) {
            let _ = events.try_send(SessionEvent::Starved { by: since_tick.saturating_sub(period) });
        }
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

#[cfg(test)]
mod tests;
