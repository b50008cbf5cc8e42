//! Where held batches are: in memory, and beyond that in a journal.
//!
//! The journal is a ring of bytes that this module only gives out places of. What was held first is applied first, so that
//! places are given back in the order in which they were taken; an open batch whose session ends gives its places back at
//! the other end. A place is a position that only grows: the journal has it at the remainder by its size. Nothing in the
//! journal outlives the process.

use std::collections::VecDeque;

use super::record::Record;

/// Records are written to the journal in pieces of about so many bytes. One that is larger is a piece of its own.
const CHUNK: u64 = 1 << 20;

/// Places are multiples of it in bytes, as direct I/O wants them.
pub const ALIGN: u64 = 4096;

/// What a piece that is in the journal costs in memory.
const DESCRIPTOR: u64 = 128;

/// What a source may be told that can be held, in bytes, with so much memory and journal: places are not used to the full.
#[must_use]
pub fn capacity(memory: u64, journal: u64) -> u64 {
    memory + journal - journal / 16
}

/// A range of the journal, in bytes from where it first began. It may wrap around the journal's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte.
    pub at: u64,
    /// Bytes; at least what the records in it cost.
    pub length: u64,
}

/// What the caller has to find in a place when it reads it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Bytes that were written.
    pub bytes: u64,
    /// Over them, see [`super::record::digest`].
    pub digest: u128,
}

/// Records that have to be written to the journal before anything else is received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spill {
    /// Where.
    pub place: Place,
    /// What.
    pub records: Vec<Record>,
}

/// Records that are in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where.
    pub place: Place,
    /// What was written there.
    pub stored: Stored,
}

/// Some of a batch's records, in order.
#[derive(Debug)]
pub(super) enum Segment {
    Memory(Vec<Record>, u64),
    Journal(Chunk),
}

impl Segment {
    fn memory(&self) -> u64 {
        match self {
            Segment::Memory(_, cost) => *cost,
            Segment::Journal(_) => DESCRIPTOR,
        }
    }
}

/// How much may be held, and how much is.
#[derive(Debug)]
pub(super) struct Room {
    memory: u64,
    journal: u64,
    /// Size of a piece in bytes.
    chunk: u64,
    in_memory: u64,
    head: u64,
    tail: u64,
}

/// A batch that is coming in.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    segments: VecDeque<Segment>,
    /// For the journal, not yet enough for a piece.
    gathering: Vec<Record>,
    gathered: u64,
    /// Being written, with what it costs in memory until that is done.
    pending: Option<(Place, u64)>,
    /// What it has of the memory.
    memory: u64,
    /// The journal's end when the batch began.
    tail: u64,
}

impl Room {
    pub(super) fn new(memory: u64, journal: u64) -> Self {
        let chunk = CHUNK.min(memory / 8);
        Self { memory, journal: journal - journal % ALIGN, chunk, in_memory: 0, head: 0, tail: 0 }
    }

    /// Bytes that may be held in all.
    pub(super) fn capacity(&self) -> u64 {
        self.memory + self.journal
    }

    /// Bytes in memory.
    pub(super) fn in_memory(&self) -> u64 {
        self.in_memory
    }

    /// Bytes in the journal.
    pub(super) fn in_journal(&self) -> u64 {
        self.tail - self.head
    }

    /// Whether memory is to be had for `bytes` more, besides what gathers for the journal.
    fn has_memory(&self, bytes: u64) -> bool {
        self.journal == 0 || self.in_memory + bytes + self.chunk <= self.memory
    }

    fn take(&mut self, bytes: u64) -> Option<Place> {
        let length = bytes.next_multiple_of(ALIGN);
        if self.in_journal() + length > self.journal {
            return None;
        }
        let place = Place { at: self.tail, length };
        self.tail += length;
        Some(place)
    }

    pub(super) fn begin(&self) -> Incoming {
        Incoming { tail: self.tail, ..Incoming::default() }
    }

    /// The batch is dropped.
    pub(super) fn drop_incoming(&mut self, batch: &Incoming) {
        self.in_memory -= batch.memory;
        self.tail = batch.tail;
    }

    /// The segment, which is the oldest, is on the disk.
    pub(super) fn give_back(&mut self, memory: u64, place: Option<Place>) {
        self.in_memory -= memory;
        if let Some(place) = place {
            self.head = place.at + place.length;
        }
    }
}

impl Incoming {
    /// Takes in a record. What is returned has to be written, and [`Incoming::written`] called, before anything else.
    pub(super) fn push(&mut self, room: &mut Room, record: Record) -> Option<Spill> {
        let cost = record.cost();
        let in_memory = self.gathering.is_empty() && room.has_memory(cost);
        room.in_memory += cost;
        self.memory += cost;
        if in_memory {
            self.keep(room, vec![record], cost);
            return None;
        }
        self.gathering.push(record);
        self.gathered += cost;
        if self.gathered >= room.chunk { self.spill(room) } else { None }
    }

    /// Nothing more comes. As for [`Incoming::push`].
    pub(super) fn close(&mut self, room: &mut Room) -> Option<Spill> {
        if self.gathering.is_empty() {
            None
        } else if room.has_memory(0) {
            self.stay(room);
            None
        } else {
            self.spill(room)
        }
    }

    fn keep(&mut self, room: &Room, mut records: Vec<Record>, cost: u64) {
        match self.segments.back_mut() {
            // Not for ever longer: its memory is given back as a whole.
            Some(Segment::Memory(all, total)) if *total < room.chunk => {
                all.append(&mut records);
                *total += cost;
            }
            _ => self.segments.push_back(Segment::Memory(records, cost)),
        }
    }

    /// What gathered stays in memory after all.
    fn stay(&mut self, room: &Room) {
        let (records, cost) = (std::mem::take(&mut self.gathering), std::mem::take(&mut self.gathered));
        self.keep(room, records, cost);
    }

    fn spill(&mut self, room: &mut Room) -> Option<Spill> {
        let Some(place) = room.take(self.gathered) else {
            self.stay(room);
            return None;
        };
        self.pending = Some((place, std::mem::take(&mut self.gathered)));
        Some(Spill { place, records: std::mem::take(&mut self.gathering) })
    }

    /// Whether something is being written.
    pub(super) fn is_writing(&self) -> bool {
        self.pending.is_some()
    }

    /// What was to be written is.
    pub(super) fn written(&mut self, room: &mut Room, stored: Stored) {
        let Some((place, cost)) = self.pending.take() else { return };
        room.in_memory = room.in_memory - cost + DESCRIPTOR;
        self.memory = self.memory - cost + DESCRIPTOR;
        self.segments.push_back(Segment::Journal(Chunk { place, stored }));
    }

    pub(super) fn into_segments(self) -> VecDeque<Segment> {
        self.segments
    }
}

/// What a segment has, to be given back when it is done.
pub(super) fn share(segment: &Segment) -> (u64, Option<Place>) {
    let place = match segment {
        Segment::Memory(..) => None,
        Segment::Journal(chunk) => Some(chunk.place),
    };
    (segment.memory(), place)
}
