//! The primary's end of a link.

use std::time::Duration;

use bytes::Bytes;

use super::{
    detector::AckLate,
    error::{CloseReason, LinkError},
    frame::{
        self, CHUNK, EpochEnd, Frame, Heartbeat, LostReason, MAX_PAGES_PER_FRAME, ProtectOffer, Purpose, QueryEntry,
        StatePart, StopReason, Welcome, capability,
    },
    handshake,
    session::{LinkOptions, Outbox, Report, Session, SessionEvent},
    token::Token,
    transport::{Connection, Transport},
};
use crate::{
    ids::{Epoch, Generation, Nonce, ProtectionId, SessionKey},
    stream::{PAGE_SIZE, PageBatch, Record},
};

/// Opens links from the primary's side.
#[derive(Debug)]
pub struct PrimaryLink;

impl PrimaryLink {
    /// Connects, offers to protect and waits until the backup accepts, at most `options.handshake_timeout`.
    ///
    /// # Errors
    /// [`LinkError::Refused`] with the backup's sentence, [`LinkError::Superseded`] if it runs its copy, or what went wrong on the way.
    pub async fn connect(
        transport: &Transport,
        key: SessionKey,
        offer: ProtectOffer,
        options: &LinkOptions,
    ) -> Result<(LinkSender, LinkEvents), LinkError> {
        let connection = transport.open().await?;
        Self::over(connection, &transport.to_string(), key, offer, options).await
    }

    /// As [`Self::connect`], over a stream that is open already; `peer` names it in messages.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn over(
        connection: Connection,
        peer: &str,
        key: SessionKey,
        offer: ProtectOffer,
        options: &LinkOptions,
    ) -> Result<(LinkSender, LinkEvents), LinkError> {
        let remembers = frame::page_cache(offer.max_memory_kib);
        let purpose = Purpose::Protect(offer);
        let (session, welcome) = handshake::connect(connection, peer, key, purpose, options).await?;
        let Session { outbox, events } = session;
        let page_cache = (welcome.capabilities & capability::PAGE_CODEC != 0).then_some(remembers);
        Ok((LinkSender { outbox, welcome, page_cache }, LinkEvents { events }))
    }

    /// Asks the peer what it knows about one protection, or about all.
    ///
    /// # Errors
    /// What went wrong on the way.
    pub async fn query(
        transport: &Transport,
        protection: Option<ProtectionId>,
        options: &LinkOptions,
    ) -> Result<Vec<QueryEntry>, LinkError> {
        let key = SessionKey { generation: Generation(0), nonce: Nonce::random() };
        let connection = transport.open().await?;
        handshake::query(connection, &transport.to_string(), key, protection, options).await
    }
}

/// Sends to the backup. All data calls wait for room in the queue and fail with [`LinkError::Closed`] once the session has ended.
#[derive(Clone, Debug)]
pub struct LinkSender {
    outbox: Outbox,
    welcome: Welcome,
    page_cache: Option<usize>,
}

impl LinkSender {
    /// What the backup said about itself.
    #[must_use]
    pub fn peer(&self) -> &Welcome {
        &self.welcome
    }

    /// Sends the domain's configuration, xl's JSON. Once, first.
    ///
    /// # Errors
    /// [`LinkError::Closed`], or [`LinkError::Unsendable`] if it is longer than 1 MiB.
    pub async fn config(&self, json: Bytes) -> Result<(), LinkError> {
        self.whole(Frame::Config(json.clone()), json.len()).await
    }

    /// Sends libxc's headers and static records. Once, after the configuration.
    ///
    /// # Errors
    /// [`LinkError::Closed`], or [`LinkError::Unsendable`] if it is longer than 1 MiB.
    pub async fn preamble(&self, bytes: Bytes) -> Result<(), LinkError> {
        self.whole(Frame::Preamble(bytes.clone()), bytes.len()).await
    }

    async fn whole(&self, frame: Frame, size: usize) -> Result<(), LinkError> {
        let kind = frame.frame_type();
        if size > kind.limit() {
            return Err(LinkError::Unsendable(super::FrameError::TooLong {
                kind: kind.name(),
                length: size as u64,
                limit: kind.limit() as u64,
            }));
        }
        self.outbox.data(frame, size).await
    }

    /// Opens an epoch. One that was begun and not ended is discarded.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn epoch_begin(&self, epoch: Epoch, armed: bool) -> Result<(), LinkError> {
        self.outbox.data(Frame::EpochBegin { epoch, armed }, 0).await
    }

    /// Sends pages of the open epoch, cut to frames of at most 256 KiB.
    ///
    /// # Errors
    /// [`LinkError::Closed`], or [`LinkError::Unsendable`] if contents and entries do not agree.
    pub async fn pages(&self, epoch: Epoch, batch: PageBatch) -> Result<(), LinkError> {
        let parts = split_pages(batch)?;
        for batch in parts {
            let size = batch.size();
            self.outbox.data(Frame::Pages { epoch, batch }, size).await?;
        }
        Ok(())
    }

    /// The bytes of pages that the peer remembers, if pages may be [coded](Self::coded_pages).
    #[must_use]
    pub fn page_cache(&self) -> Option<usize> {
        self.page_cache
    }

    /// Sends one part that a [`PageEncoder`](super::pages::PageEncoder) made for the open epoch. All parts, in order.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn coded_pages(&self, epoch: Epoch, body: Bytes) -> Result<(), LinkError> {
        let size = body.len();
        self.outbox.data(Frame::CodedPages { epoch, body }, size).await
    }

    /// Whether more than half of the room for data is taken: the link is slower than what is sent.
    #[must_use]
    pub fn congested(&self) -> bool {
        self.outbox.congested()
    }

    /// Sends a state record of the open epoch, cut to frames of at most 256 KiB.
    ///
    /// # Errors
    /// [`LinkError::Closed`], or [`LinkError::Unsendable`] if it is longer than 128 MiB.
    pub async fn state(&self, epoch: Epoch, record: Record) -> Result<(), LinkError> {
        for part in split_record(epoch, &record)? {
            let size = part.data.len();
            self.outbox.data(Frame::State(part), size).await?;
        }
        Ok(())
    }

    /// Closes the open epoch. From here on its acknowledgement is due.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn epoch_end(&self, end: EpochEnd) -> Result<(), LinkError> {
        self.outbox.data(Frame::EpochEnd(end), 0).await
    }

    /// Sends hashes of pages for the epoch that has just ended, before the next one begins. Waits for room.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub async fn audit(&self, sample: crate::audit::Sample) -> Result<(), LinkError> {
        self.outbox.data(Frame::Audit(sample), 0).await
    }

    /// Ends the protection on purpose, before all queued data. [`LinkEvent::Stopped`] says when no copy is left on the backup.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub fn stop(&self, reason: StopReason) -> Result<(), LinkError> {
        self.outbox.control(Frame::Stop { reason })
    }

    /// Proposes a mode; [`LinkEvent::TokenAck`] says when the backup has it on disk.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub fn token(&self, seq: u64, token: Token) -> Result<(), LinkError> {
        self.outbox.control(Frame::Token { seq, token })
    }

    /// Gives the guest, which stands still after `epoch`, to the backup. [`LinkEvent::Superseded`] or [`LinkEvent::HandoverFailed`]
    /// answers.
    ///
    /// # Errors
    /// [`LinkError::Closed`].
    pub fn hand_over(&self, epoch: Epoch, token: Token) -> Result<(), LinkError> {
        self.outbox.control(Frame::Handover { epoch, token })
    }

    /// Sets what the next heartbeat tells.
    pub fn report(&self, report: Report) {
        self.outbox.report(report);
    }

    /// Ends the session; what data is queued is dropped. The backup keeps its copy.
    pub fn close(&self) {
        self.outbox.close();
    }
}

/// What the backup and the link tell the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The backup holds this epoch and all before it.
    Ack {
        /// The newest complete epoch.
        epoch: Epoch,
        /// Epochs that its receiver has not taken in yet.
        backlog_epochs: u32,
        /// Bytes that its receiver has not taken in yet.
        backlog_bytes: u64,
    },
    /// A sign of life.
    Heartbeat(Heartbeat),
    /// The backup cannot protect any longer.
    BackupLost {
        /// For programs.
        reason: LostReason,
        /// For people.
        text: String,
    },
    /// The backup runs its copy: ours stays sealed and stops.
    Superseded {
        /// For people.
        text: String,
    },
    /// The backup could not activate the copy that it was handed; nothing is left of it.
    HandoverFailed {
        /// For people.
        text: String,
    },
    /// The backup has this mode on disk.
    TokenAck {
        /// Which proposal.
        seq: u64,
    },
    /// No copy is left on the backup, as asked.
    Stopped,
    /// Nothing was heard for the detection time. The session stays open.
    Suspect {
        /// How long nothing was heard.
        silence: Duration,
    },
    /// A suspected backup was heard again.
    Alive,
    /// An ended epoch is not acknowledged and nothing moves, although the backup may be talking.
    AckLate(AckLate),
    /// This host was starved or frozen.
    Starved {
        /// For how long.
        by: Duration,
    },
    /// The session has ended. The last event.
    Closed(CloseReason),
}

/// Receives from the backup. Dropping it ends the session.
#[derive(Debug)]
pub struct LinkEvents {
    events: tokio::sync::mpsc::Receiver<SessionEvent>,
}

impl LinkEvents {
    /// The next event; `None` after [`LinkEvent::Closed`]. Cancel safe.
    pub async fn next(&mut self) -> Option<LinkEvent> {
        Some(match self.events.recv().await? {
            SessionEvent::Suspect { silence } => LinkEvent::Suspect { silence },
            SessionEvent::Alive => LinkEvent::Alive,
            SessionEvent::AckLate(late) => LinkEvent::AckLate(late),
            SessionEvent::Starved { by } => LinkEvent::Starved { by },
            SessionEvent::Closed(reason) => self.end(reason),
            SessionEvent::Frame(frame) => match frame {
                Frame::Ack { epoch, backlog_epochs, backlog_bytes } => {
                    LinkEvent::Ack { epoch, backlog_epochs, backlog_bytes }
                }
                Frame::Heartbeat(beat) => LinkEvent::Heartbeat(beat),
                Frame::BackupLost { reason, text } => LinkEvent::BackupLost { reason, text },
                Frame::Superseded { text } => LinkEvent::Superseded { text },
                Frame::Stopped => LinkEvent::Stopped,
                Frame::HandoverFailed { text } => LinkEvent::HandoverFailed { text },
                Frame::TokenAck { seq } => LinkEvent::TokenAck { seq },
                Frame::Hello(_)
                | Frame::Welcome(_)
                | Frame::Refuse { .. }
                | Frame::QueryResult(_)
                | Frame::Challenge { .. }
                | Frame::ChallengeAnswer { .. }
                | Frame::Config(_)
                | Frame::Preamble(_)
                | Frame::EpochBegin { .. }
                | Frame::Pages { .. }
                | Frame::State(_)
                | Frame::EpochEnd(_)
                | Frame::Audit(_)
                | Frame::CodedPages { .. }
                | Frame::Stop { .. }
                | Frame::Handover { .. }
                | Frame::Token { .. }
                | Frame::Error { .. } => self.end(CloseReason::Unexpected(frame.name())),
            },
        })
    }

    fn end(&mut self, reason: CloseReason) -> LinkEvent {
        self.events.close();
        while self.events.try_recv().is_ok() {}
        LinkEvent::Closed(reason)
    }
}

/// Cuts a batch to frames of at most [`CHUNK`] bytes and [`MAX_PAGES_PER_FRAME`] pages. Entries without contents are cheap: a first
/// copy has a million of them for the holes in an HVM guest's memory map.
fn split_pages(batch: PageBatch) -> Result<Vec<PageBatch>, super::FrameError> {
    /// What the header, epoch and count may take of a chunk.
    const FIELDS: usize = 256;
    /// What an entry and its encoding take.
    const ENTRY: usize = 9;
    if batch.data.len() != batch.data_pages() * PAGE_SIZE {
        return Err(super::FrameError::Malformed {
            kind: super::frame::FrameType::Pages.name(),
            what: "contents and entries do not agree",
        });
    }
    let mut parts = Vec::new();
    let mut data = batch.data;
    let mut rest = batch.entries.as_slice();
    while !rest.is_empty() {
        let (mut taken, mut contents, mut size) = (0, 0, FIELDS);
        for entry in rest.iter().take(MAX_PAGES_PER_FRAME) {
            let page = if PageBatch::has_data(*entry) { PAGE_SIZE } else { 0 };
            if size + ENTRY + page > CHUNK {
                break;
            }
            size += ENTRY + page;
            contents += page;
            taken += 1;
        }
        let (now, later) = rest.split_at(taken);
        parts.push(PageBatch { entries: now.to_vec(), data: data.split_to(contents) });
        rest = later;
    }
    Ok(parts)
}

/// Cuts a record to parts of at most [`CHUNK`] bytes; an empty record is one part.
fn split_record(epoch: Epoch, record: &Record) -> Result<Vec<StatePart>, super::FrameError> {
    /// What the fields before a part's bytes take.
    const FIELDS: usize = 256;
    if record.body.len() > super::frame::MAX_RECORD {
        return Err(super::FrameError::TooLong {
            kind: super::frame::FrameType::State.name(),
            length: record.body.len() as u64,
            limit: super::frame::MAX_RECORD as u64,
        });
    }
    let total = record.body.len();
    let mut parts = Vec::new();
    let mut offset = 0;
    loop {
        let end = total.min(offset + CHUNK - FIELDS);
        parts.push(StatePart {
            epoch,
            layer: record.layer,
            kind: record.kind,
            total: total as u32,
            offset: offset as u32,
            data: record.body.slice(offset..end),
        });
        offset = end;
        if offset == total {
            return Ok(parts);
        }
    }
}

#[cfg(test)]
mod tests;
