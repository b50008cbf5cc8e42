//! The target at work: takes the source's log in and carries out what [`Target`] asks for.

use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dial::host_name;
use super::engine::Parts;
use super::events::DiskEvent;
use super::node::Shared;
use super::spill::Spills;
use crate::mirror::core::extent::Extent;
use crate::mirror::core::intent::Intent;
use crate::mirror::core::meta::Role;
use crate::mirror::core::record::{Payload, Record, digest};
use crate::mirror::core::spill::capacity;
use crate::mirror::core::target::{Checked, EpochError, HeadState, Target, TargetAction, TargetProgress, range_of};
use crate::mirror::peer::{Frame, Reader, RefuseCode, Welcome, Writer};

const ALIVE: Duration = Duration::from_secs(1);
/// How long a source may take to open its session. Nothing else can become of the disk meanwhile.
const GREETING: Duration = Duration::from_secs(30);
/// Records that are applied at once, as long as they do not overlap.
const WINDOW: usize = 32;

type Sender = Writer<BufWriter<UnixStream>>;

struct State {
    target: Target,
    /// The session's stream, while it lasts.
    stream: Option<UnixStream>,
    active: Option<u64>,
    broken: Option<&'static str>,
    over: bool,
}

/// A copy that follows, or has followed until its source was lost.
pub(super) struct Follower {
    shared: Arc<Shared>,
    state: Mutex<State>,
    changed: Condvar,
    /// The journal, and which of its sessions this is.
    spills: Option<(Arc<Spills>, u64)>,
}

impl Follower {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether another session may take its place.
    pub(super) fn is_replaceable(&self) -> bool {
        let state = self.lock();
        !state.target.is_armed() && state.active.is_none()
    }

    /// Ends the session and waits until nothing is being written any more.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.over = true;
        if let Some(stream) = state.stream.take() {
            drop(stream.shutdown(std::net::Shutdown::Both));
        }
        self.changed.notify_all();
        while !state.target.is_idle() && state.broken.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all of `epoch` is here, at most until `deadline`.
    pub(super) fn wait_held(&self, epoch: u64, deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.target.holds(epoch) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.over || state.broken.is_some() || state.stream.is_none() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn commit(&self, epoch: u64) -> Result<(), EpochError> {
        let result = self.lock().target.commit(epoch);
        self.changed.notify_all();
        result
    }

    pub(super) fn disarm(&self) {
        self.lock().target.disarm();
        self.changed.notify_all();
    }

    pub(super) fn freeze(&self) {
        let mut state = self.lock();
        state.target.freeze();
        if let Some(stream) = state.stream.take() {
            drop(stream.shutdown(std::net::Shutdown::Both));
        }
    }

    /// Returns when the disk is that of `epoch` and the head on disk says so.
    pub(super) fn activate(&self, epoch: u64) -> Result<(), EpochError> {
        self.freeze();
        let mut state = self.lock();
        if state.active == Some(epoch) {
            return Ok(());
        }
        state.target.activate(epoch)?;
        self.changed.notify_all();
        loop {
            if state.active == Some(epoch) {
                return Ok(());
            }
            if let Some(why) = state.broken {
                return Err(EpochError::Broken(why));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn progress(&self) -> (TargetProgress, bool, bool, bool) {
        let state = self.lock();
        (state.target.progress(), state.target.is_synced(), state.target.is_armed(), state.stream.is_some())
    }

    /// Carries out actions until it is stopped.
    fn work(self: &Arc<Self>, writer: &Mutex<Sender>) {
        let mut state = self.lock();
        let mut quiet = Instant::now();
        loop {
            let actions = state.target.take_actions();
            if actions.is_empty() {
                if state.over || state.active.is_some() || state.broken.is_some() {
                    return;
                }
                if quiet.elapsed() >= ALIVE {
                    quiet = Instant::now();
                    state.target.settle();
                    drop(state);
                    send(writer, &[Frame::Alive]);
                    state = self.lock();
                    continue;
                }
                state = self.changed.wait_timeout(state, ALIVE).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            let mut frames = Vec::new();
            for action in actions {
                match action {
                    TargetAction::Reply(reply) => frames.push(Frame::Reply(reply)),
                    other => {
                        send(writer, &frames);
                        frames.clear();
                        self.carry_out(other);
                    }
                }
            }
            send(writer, &frames);
            self.changed.notify_all();
            state = self.lock();
        }
    }

    fn carry_out(&self, action: TargetAction) {
        let parts = &self.shared.parts;
        match action {
            TargetAction::SaveHead(state) => {
                let saved = self.shared.change_head(|head| {
                    head.role = if state.source { Role::Source } else { Role::Target };
                    (head.synced, head.applying, head.epoch) = (state.synced, state.applying, state.epoch);
                });
                self.lock().target.saved(saved.is_ok());
            }
            TargetAction::Apply(records) => {
                let applied = apply(parts, records);
                self.lock().target.applied(applied);
            }
            TargetAction::ApplySpilled(chunk) => {
                let records = self.spills.as_ref().map(|(spills, session)| spills.read(*session, &chunk));
                let applied = match records {
                    Some(Ok(records)) => apply(parts, records),
                    Some(Err(error)) => {
                        tracing::error!(%error, "held records cannot be applied");
                        Err(())
                    }
                    None => Err(()),
                };
                self.lock().target.applied(applied);
            }
            TargetAction::Flush => {
                let flushed = parts.backing.flush();
                self.lock().target.flushed(flushed.is_ok());
            }
            TargetAction::Held(epoch) => parts.events.tell(&DiskEvent::Held { epoch }),
            TargetAction::Activated(epoch) => self.lock().active = Some(epoch),
            TargetAction::Broken(why) => {
                let mut state = self.lock();
                state.broken = Some(why);
                // The source would go on sending what nobody applies.
                if let Some(stream) = state.stream.take() {
                    drop(stream.shutdown(std::net::Shutdown::Both));
                }
                drop(state);
                parts.events.tell(&DiskEvent::Broken { why: why.into() });
            }
            TargetAction::Reply(_) => {}
        }
    }
}

/// Does the records in order; those that do not overlap at once.
fn apply(parts: &Parts, records: Vec<Record>) -> Result<Vec<Checked>, ()> {
    let mut checks = Vec::new();
    let mut group: Vec<Record> = Vec::new();
    let mut records = records.into_iter().peekable();
    while let Some(record) = records.next() {
        group.push(record);
        let clash = records
            .peek()
            .and_then(range_of)
            .is_some_and(|next: Extent| group.iter().filter_map(range_of).any(|range| range.overlaps(next)));
        if group.len() < WINDOW && !clash && records.peek().is_some() {
            continue;
        }
        let jobs = std::mem::take(&mut group).into_iter().map(|record| {
            let backing = parts.backing.clone();
            move || -> std::io::Result<Option<Checked>> {
                match record {
                    Record::Write { extent, payload: Payload::Data(data) } => backing.write(extent.offset, &data)?,
                    Record::Write { extent, payload: Payload::Zeroes } => backing.zero(extent, true)?,
                    Record::Check { id, extent, digest: wanted, verify } => {
                        let same = digest(backing.read(extent)?.as_ref()) == wanted;
                        return Ok(Some(Checked { id, same, verify }));
                    }
                    Record::SyncDone | Record::End(_) => {}
                }
                Ok(None)
            }
        });
        for done in parts.pool.run_all(jobs.collect()) {
            checks.extend(done.map_err(|error| tracing::error!(%error, "the copy cannot be written"))?);
        }
    }
    Ok(checks)
}

/// A stream that cannot be written is noticed by whoever reads it.
fn send(writer: &Mutex<Sender>, frames: &[Frame]) {
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    for frame in frames {
        if let Err(error) = writer.send(frame) {
            tracing::debug!(%error, "the source cannot be told");
            return;
        }
    }
    drop(writer.flush());
}

/// Serves one source. Blocks until its session ends.
pub(super) fn accept(shared: &Arc<Shared>, stream: &UnixStream) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    stream.set_read_timeout(Some(GREETING)).map_err(|e| text(&e))?;
    let mut reader = Reader::new(BufReader::with_capacity(1 << 20, stream.try_clone().map_err(|e| text(&e))?), None);
    let hello = match reader.receive().map_err(|e| text(&e))? {
        Frame::Hello(hello) => hello,
        other => return Err(format!("the first frame is {other:?}")),
    };
    let nonce = reader.nonce().unwrap_or_default();
    let to = BufWriter::new(stream.try_clone().map_err(|e| text(&e))?);
    let writer = Arc::new(Mutex::new(Writer::new(to, nonce)));
    let refuse = |code, why: String| {
        send(&writer, &[Frame::Refuse(code, why.clone())]);
        Err(why)
    };
    if hello.disk != shared.name {
        return refuse(RefuseCode::Disk, format!("this is disk {}, not {}", shared.name, hello.disk));
    }
    // The disk becomes nothing else meanwhile.
    let Some(changing) = shared.try_change() else {
        return refuse(
            RefuseCode::Busy,
            "another source is just being accepted, or the disk is changing its role".into(),
        );
    };
    if let Err(why) = shared.make_room() {
        return refuse(RefuseCode::Busy, why);
    }
    let head = shared.head();
    let regions = head.geometry.regions();
    let journal = shared.spills.as_ref().map_or(0, |spills| spills.size());
    let pages = match shared.parts.meta.load_pages(regions) {
        Ok(pages) => pages,
        Err(error) => return refuse(RefuseCode::Failed, error.to_string()),
    };
    let marks = Intent::load(head.log, regions, &pages).marked(regions).collect();
    let welcome = Welcome {
        host: host_name(),
        geometry: head.geometry,
        lineage: head.lineage,
        role: head.role,
        capacity: capacity(shared.memory, journal),
        marks,
    };
    send(&writer, &[Frame::Welcome(welcome)]);
    let lineage = match reader.receive().map_err(|e| text(&e))? {
        Frame::Start { lineage } => lineage,
        other => return Err(format!("the source sent {other:?} out of turn")),
    };
    let head = HeadState { synced: false, applying: false, epoch: None, source: false };
    let started = shared.change_head(|h| {
        (h.lineage, h.synced, h.applying, h.epoch) = (lineage, false, false, None);
    });
    let started = started.and_then(|h| shared.parts.meta.clear_pages(h.log, regions));
    if let Err(error) = started {
        return refuse(RefuseCode::Failed, error.to_string());
    }
    let follower = Arc::new(Follower {
        shared: shared.clone(),
        state: Mutex::new(State {
            target: Target::with_journal(shared.head().geometry, shared.memory, journal, head),
            stream: stream.try_clone().ok(),
            active: None,
            broken: None,
            over: false,
        }),
        changed: Condvar::new(),
        spills: shared.spills.as_ref().map(|spills| (spills.clone(), spills.begin())),
    });
    shared.set_follower(follower.clone());
    drop(changing);
    let (worker, to) = (follower.clone(), writer.clone());
    std::thread::Builder::new().name("apply".into()).spawn(move || worker.work(&to)).map_err(|e| text(&e))?;
    stream.set_read_timeout(None).map_err(|e| text(&e))?;
    send(&writer, &[Frame::Started]);
    let why = take_in(&follower, &mut reader);
    send(&writer, &[Frame::Refuse(RefuseCode::Failed, why.clone())]);
    let mut state = follower.lock();
    state.target.session_over();
    state.stream = None;
    drop(state);
    follower.changed.notify_all();
    Err(why)
}

fn take_in(follower: &Follower, reader: &mut Reader<impl Read>) -> String {
    loop {
        let record = match reader.receive() {
            Ok(Frame::Record(record)) => record,
            Ok(Frame::Alive) => continue,
            Ok(other) => return format!("the source sent {other:?} out of turn"),
            Err(closed) => return closed.to_string(),
        };
        let end = matches!(record, Record::End(_));
        let spill = match follower.lock().target.receive(record) {
            Ok(spill) => spill,
            Err(error) => return error.to_string(),
        };
        if let (Some(spill), Some((spills, session))) = (spill, &follower.spills) {
            match spills.write(*session, spill) {
                Ok(stored) => follower.lock().target.spilled(stored),
                Err(why) => return format!("held records cannot be put aside: {why}"),
            }
        }
        if end {
            follower.changed.notify_all();
        }
    }
}

/// Joins our standard streams with a disk service's peer socket, for a source that comes by ssh.
///
/// # Errors
/// When the service does not run, or a stream breaks.
pub fn bridge(socket: &std::path::Path) -> std::io::Result<()> {
    let mut to = UnixStream::connect(socket)?;
    let mut from = to.try_clone()?;
    // The descriptors themselves: what std puts before them waits for ends of lines.
    let input = std::fs::File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let out = std::fs::File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    std::thread::spawn(move || {
        let copied = pump(&mut from, out);
        // Our input may stay open for ever: the process ends with the service's side.
        std::process::exit(i32::from(copied.is_err()));
    });
    pump(input, &mut to)?;
    to.shutdown(std::net::Shutdown::Write)?;
    // The other thread ends the process once the service has said its last.
    loop {
        std::thread::park();
    }
}

/// Not `io::copy`: that splices, and a splice from a pipe to a socket holds what it has back until more comes (seen on
/// Linux 6.18).
fn pump(mut from: impl Read, mut to: impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
