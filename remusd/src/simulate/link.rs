//! One end of a connection with the link's own codec and detectors: what `link::session` does with tasks, done with events.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::BytesMut;

use super::net::{ConnId, Parcel};
use super::plan::{HostIx, MS};
use super::world::{Input, World};
use super::{ACK_DEADLINE, DETECTION};
use crate::ids::{Epoch, SessionKey};
use crate::link::codec::{Decoder, Encoder};
use crate::link::detector::{AckWatch, Detector, Verdict};
use crate::link::{Frame, GuestState, Heartbeat};

/// What a session tells its owner.
#[derive(Debug)]
pub enum Heard {
    /// A frame.
    Frame(Frame),
    /// Nothing was heard for the detection time.
    Suspect,
    /// A suspected peer was heard again.
    Alive,
    /// An acknowledgement is overdue.
    AckLate,
    /// The session has ended.
    Closed,
}

/// One end of an open session.
#[derive(Debug)]
pub struct LinkEnd {
    /// Which connection.
    pub conn: ConnId,
    host: HostIx,
    end: usize,
    encoder: Encoder,
    decoder: Decoder,
    detector: Detector,
    acks: AckWatch,
    data: VecDeque<Frame>,
    writing: bool,
    ticks: u32,
    /// What the next heartbeat tells.
    pub epoch: Epoch,
}

impl LinkEnd {
    /// The end of a connection whose handshake is done with these.
    pub fn new(world: &mut World, host: HostIx, conn: ConnId, end: usize, encoder: Encoder, decoder: Decoder) -> Self {
        let now = world.instant();
        let detection = Duration::from_micros(DETECTION);
        world.later(host, DETECTION / 8, Input::LinkTick(conn));
        Self {
            conn,
            host,
            end,
            encoder,
            decoder,
            detector: Detector::new(detection, now),
            acks: AckWatch::new(Duration::from_micros(ACK_DEADLINE), now),
            data: VecDeque::new(),
            writing: false,
            ticks: 0,
            epoch: Epoch(0),
        }
    }

    /// Sends a frame before all data.
    pub fn control(&mut self, world: &mut World, frame: &Frame) {
        let mut bytes = BytesMut::new();
        if self.encoder.encode(frame, &mut bytes).is_ok() {
            world.net_send(self.conn, self.end, Parcel::Bytes(bytes.to_vec()));
        }
    }

    /// Queues a frame of data.
    pub fn data(&mut self, world: &mut World, frame: Frame) {
        if let Frame::EpochEnd(end) = &frame {
            self.acks.ended(end.epoch, world.instant());
        }
        self.data.push_back(frame);
        if !std::mem::replace(&mut self.writing, true) {
            let wait = world.takes(60);
            world.later(self.host, wait, Input::LinkWrite(self.conn));
        }
    }

    /// Writes the next frame of data.
    pub fn write(&mut self, world: &mut World) {
        self.writing = false;
        let Some(frame) = self.data.pop_front() else { return };
        self.control(world, &frame);
        self.acks.progress(world.instant());
        if !self.data.is_empty() {
            self.writing = true;
            let wait = world.takes(80);
            world.later(self.host, wait, Input::LinkWrite(self.conn));
        }
    }

    /// The timer.
    pub fn tick(&mut self, world: &mut World) -> Vec<Heard> {
        let now = world.instant();
        let mut heard = Vec::new();
        if let Some(Verdict::Suspect { .. }) = self.detector.tick(now) {
            heard.push(Heard::Suspect);
        }
        if self.acks.tick(now).is_some() {
            heard.push(Heard::AckLate);
        }
        self.ticks += 1;
        if self.ticks.is_multiple_of(2) {
            let beat = Heartbeat {
                epoch: self.epoch,
                guest: GuestState::Unknown,
                since_resume_ms: 0,
                wall_clock_ms: world.wall_clock(self.host),
                late: false,
                heard_ms: u32::try_from(self.detector.silence(now).as_millis()).unwrap_or(u32::MAX),
            };
            self.control(world, &Frame::Heartbeat(beat));
        }
        world.later(self.host, DETECTION / 8, Input::LinkTick(self.conn));
        heard
    }

    /// Something has arrived.
    pub fn arrive(&mut self, world: &mut World, parcel: &Parcel) -> Vec<Heard> {
        let Parcel::Bytes(bytes) = parcel else { return vec![Heard::Closed] };
        let mut heard = Vec::new();
        if self.detector.heard(world.instant()) == Some(Verdict::Alive) {
            heard.push(Heard::Alive);
        }
        self.decoder.push(bytes);
        loop {
            match self.decoder.next_frame() {
                Ok(None) => return heard,
                Ok(Some(Frame::Heartbeat(_))) => {}
                Ok(Some(frame)) => {
                    if let Frame::Ack { epoch, .. } = &frame {
                        self.acks.acked(*epoch, world.instant());
                    }
                    heard.push(Heard::Frame(frame));
                }
                Err(_) => {
                    self.close(world);
                    heard.push(Heard::Closed);
                    return heard;
                }
            }
        }
    }

    /// Ends the session after the control frames that were sent.
    pub fn close(&mut self, world: &mut World) {
        self.data.clear();
        world.net_close(self.conn, self.end);
    }
}

/// The first frame of a connection, as bytes, and the encoder for what follows.
#[must_use]
pub fn first(key: SessionKey, frame: &Frame) -> (Encoder, Parcel) {
    let mut encoder = Encoder::new(key);
    let parcel = next(&mut encoder, frame);
    (encoder, parcel)
}

/// A frame of a handshake, as bytes.
pub fn next(encoder: &mut Encoder, frame: &Frame) -> Parcel {
    let mut bytes = BytesMut::new();
    // Our own short frames fit.
    let _ = encoder.encode(frame, &mut bytes);
    Parcel::Bytes(bytes.to_vec())
}

/// How long a handshake may take.
pub const HANDSHAKE: super::plan::Micros = 150 * MS;
