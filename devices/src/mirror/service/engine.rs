//! The source at work: carries out what [`Source`] asks for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::events::{DiskEvent, Events};
use super::pool::Pool;
use crate::mirror::core::extent::Extent;
use crate::mirror::core::intent::Intent;
use crate::mirror::core::meta::Head;
use crate::mirror::core::record::{BatchEnd, Payload, Record};
use crate::mirror::core::source::{Action, SessionError, SessionLimits, Source, WriteId};
use crate::mirror::core::target::Reply;
use crate::mirror::core::throttle::Millis;
use crate::mirror::io::{Backing, COMPACT, MetaFile};
use crate::mirror::nbd::server::{Answer, Ask, What};

/// How often marks that may go are taken away.
const TIDY: Duration = Duration::from_secs(5);

/// What the parts of a service share.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) backing: Arc<Backing>,
    pub(super) meta: Arc<MetaFile>,
    pub(super) pool: Pool,
    pub(super) events: Arc<Events>,
}

struct Writing {
    extent: Extent,
    payload: Payload,
    punch: bool,
    fua: bool,
    to: Answer,
}

/// A write that has its range and its marks.
struct Job {
    id: WriteId,
    extent: Extent,
    payload: Payload,
    punch: bool,
    fua: bool,
}

struct State {
    source: Source,
    writes: HashMap<WriteId, Writing>,
    next: WriteId,
    /// Number of the running or last session.
    session: u64,
    in_sync: bool,
    wakes_at: Millis,
    over: bool,
}

/// A disk that a guest can write.
pub(super) struct Engine {
    parts: Parts,
    state: Mutex<State>,
    /// Records to send, marks settled, sessions ended.
    changed: Condvar,
    timer: Condvar,
    began: Instant,
}

impl Engine {
    /// Starts it, with the marks that are on disk.
    pub(super) fn start(parts: Parts, head: &Head, pages: &[Vec<u8>]) -> io::Result<Arc<Self>> {
        let intent = Intent::load(head.log, head.geometry.regions(), pages);
        let state = State {
            source: Source::new(head.geometry, intent),
            writes: HashMap::new(),
            next: 0,
            session: 0,
            in_sync: false,
            wakes_at: 0,
            over: false,
        };
        let engine = Arc::new(Self {
            parts,
            state: Mutex::new(state),
            changed: Condvar::new(),
            timer: Condvar::new(),
            began: Instant::now(),
        });
        let timer = engine.clone();
        std::thread::Builder::new().name("timer".into()).spawn(move || timer.keep_time())?;
        Ok(engine)
    }

    fn now(&self) -> Millis {
        self.began.elapsed().as_millis() as Millis
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_time(self: Arc<Self>) {
        let mut tidied = Instant::now();
        let mut state = self.lock();
        while !state.over {
            let now = self.now();
            let next = state.source.wake_at().unwrap_or(Millis::MAX).min(now + 1000);
            state.wakes_at = next;
            if next > now {
                let wait = Duration::from_millis(next - now);
                state = self.timer.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
            let now = self.now();
            state.source.tick(now);
            if tidied.elapsed() >= TIDY {
                tidied = Instant::now();
                state.source.tidy();
            }
            self.act(state);
            state = self.lock();
        }
    }

    /// The engine ends. Requests under way are still answered.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.over = true;
        state.session += 1;
        state.source.end_session(None);
        self.timer.notify_all();
        self.changed.notify_all();
    }

    /// A request of a client. Blocks while the disk does it; a write that has to wait for something else is left to others.
    pub(super) fn ask(self: &Arc<Self>, ask: Ask) {
        let Ask { what, fua, to } = ask;
        let backing = &self.parts.backing;
        match what {
            What::Read(extent) => match backing.read(extent) {
                Ok(data) => to.done(data.as_ref()),
                Err(error) => to.failed(&error),
            },
            What::Flush => match backing.flush() {
                Ok(()) => to.done(&[]),
                Err(error) => to.failed(&error),
            },
            What::Write(extent, data) => {
                self.write(Writing { extent, payload: Payload::Data(data), punch: false, fua, to });
            }
            What::Zero(extent, punch) => self.write(Writing { extent, payload: Payload::Zeroes, punch, fua, to }),
        }
    }

    fn write(self: &Arc<Self>, write: Writing) {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let (extent, data) = (write.extent, matches!(write.payload, Payload::Data(_)));
        state.writes.insert(id, write);
        state.source.submit(self.now(), id, extent, data);
        if let Some(own) = self.act_for(state, Some(id)) {
            self.do_write(own);
        }
    }

    /// Carries out what the source wants, and lets the lock go. Answers are sent without it.
    fn act(self: &Arc<Self>, state: MutexGuard<'_, State>) {
        self.act_for(state, None);
    }

    /// The same; if the write `own` is to be done now, it is left to the caller.
    fn act_for(self: &Arc<Self>, mut state: MutexGuard<'_, State>, own: Option<WriteId>) -> Option<Job> {
        let (mut answers, mut mine, mut changed) = (Vec::new(), None, false);
        for action in state.source.take_actions() {
            match action {
                Action::Persist(image) => {
                    let engine = self.clone();
                    self.parts.pool.run(move || {
                        let saved = engine.parts.meta.save_page(&image);
                        if let Err(error) = &saved {
                            tracing::error!(%error, "a mark could not be saved: writes to its region fail");
                        }
                        let mut state = engine.lock();
                        state.source.persisted(image.page, saved.is_ok());
                        engine.changed.notify_all();
                        engine.act(state);
                    });
                }
                Action::Write(id) => {
                    let job = state.writes.get(&id).map(|write| Job {
                        id,
                        extent: write.extent,
                        payload: write.payload.clone(),
                        punch: write.punch,
                        fua: write.fua,
                    });
                    if own == Some(id) {
                        mine = job;
                    } else if let Some(job) = job {
                        let engine = self.clone();
                        self.parts.pool.run(move || engine.do_write(job));
                    }
                }
                Action::Done(id) | Action::Failed(id) => {
                    let failed = matches!(action, Action::Failed(_));
                    answers.extend(state.writes.remove(&id).map(|w| (w.to, failed)));
                }
                Action::Read { unit, extent } => {
                    let engine = self.clone();
                    self.parts.pool.run(move || {
                        let data = engine.parts.backing.read(extent).map_err(|error| {
                            tracing::error!(%error, ?extent, "cannot read for synchronisation");
                        });
                        let mut state = engine.lock();
                        state.source.unit_read(unit, data.map(Bytes::from_owner));
                        engine.act(state);
                    });
                }
                Action::Flush => {
                    let engine = self.clone();
                    self.parts.pool.run(move || {
                        let flushed = engine.parts.backing.flush();
                        let mut state = engine.lock();
                        state.source.flushed(flushed.is_ok());
                        engine.act(state);
                    });
                }
                Action::Send => changed = true,
                Action::CutWanted => self.parts.events.tell(&DiskEvent::CutWanted {}),
                Action::Lost(why) => {
                    tracing::error!(?why, "the copy did not keep up: the session is given up");
                    state.session += 1;
                    self.changed.notify_all();
                }
                Action::OutOfSync => self.parts.events.tell(&DiskEvent::OutOfSync {}),
                Action::Verified(result) => self.parts.events.tell(&DiskEvent::Verified {
                    bytes: result.bytes,
                    differing: result.differing,
                    complete: !result.incomplete,
                }),
            }
        }
        let in_sync = state.source.is_in_sync();
        if in_sync && !state.in_sync {
            self.parts.events.tell(&DiskEvent::InSync {});
        }
        state.in_sync = in_sync;
        if state.source.wake_at().is_some_and(|at| at < state.wakes_at) {
            self.timer.notify_all();
        }
        drop(state);
        for (to, failed) in answers {
            if failed { to.failed(&io::Error::from_raw_os_error(libc::EIO)) } else { to.done(&[]) }
        }
        // Whoever waits needs the lock, and the guest waits for its answer.
        if changed {
            self.changed.notify_all();
        }
        mine
    }

    fn do_write(self: &Arc<Self>, job: Job) {
        let Job { id, extent, payload, punch, fua } = job;
        let backing = &self.parts.backing;
        let done = match &payload {
            Payload::Data(data) => backing.write(extent.offset, data),
            Payload::Zeroes => backing.zero(extent, punch),
        };
        let done = done.and_then(|()| if fua { backing.flush() } else { Ok(()) });
        if let Err(error) = &done {
            tracing::error!(%error, ?extent, "a write of the guest failed");
        }
        let payload = match payload {
            Payload::Data(data) if data.len() < COMPACT => Payload::Data(Bytes::copy_from_slice(&data)),
            other => other,
        };
        let mut state = self.lock();
        state.source.written(id, done.map(|()| payload).map_err(drop));
        self.act(state);
    }

    /// Marks regions and returns when the marks are on disk, or `false` when they cannot be.
    pub(super) fn mark(self: &Arc<Self>, regions: Vec<u32>) -> bool {
        let mut state = self.lock();
        state.source.mark(regions);
        self.act(state);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut state = self.lock();
        while !state.source.is_settled() && Instant::now() < deadline {
            state =
                self.changed.wait_timeout(state, Duration::from_millis(200)).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.source.is_settled()
    }

    /// A session begins. Returns its number.
    pub(super) fn start_session(self: &Arc<Self>, limits: SessionLimits) -> u64 {
        let now = self.now();
        let mut state = self.lock();
        state.session += 1;
        let session = state.session;
        state.source.start_session(now, limits);
        self.act(state);
        session
    }

    /// The session is over, if it still runs.
    pub(super) fn end_session(self: &Arc<Self>, session: u64) {
        let mut state = self.lock();
        if state.session == session {
            state.session += 1;
            state.source.end_session(None);
            self.changed.notify_all();
            self.act(state);
        }
    }

    /// The next record of the session; `Ok(None)` when there was none for `wait`. `Err` when the session is over.
    pub(super) fn next_record(self: &Arc<Self>, session: u64, wait: Duration) -> Result<Option<Record>, ()> {
        let deadline = Instant::now() + wait;
        let mut state = self.lock();
        loop {
            if state.session != session {
                return Err(());
            }
            if let Some(record) = state.source.next_record() {
                if state.source.waits_for_sending() {
                    state.source.tick(self.now());
                    self.act(state);
                }
                return Ok(Some(record));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A word of the target.
    pub(super) fn reply(self: &Arc<Self>, session: u64, reply: Reply) {
        let now = self.now();
        let mut state = self.lock();
        if state.session != session {
            return;
        }
        match reply {
            Reply::Applied(batch) => state.source.applied(now, batch),
            Reply::Durable(batch) => state.source.durable(batch),
            Reply::Checked { id, same } => state.source.check_result(id, same),
        }
        self.act(state);
    }

    /// See [`Source::barrier`]; refused in a session that is not armed, whose copy could never be activated. Waits for
    /// nothing but this process's own lock.
    pub(super) fn barrier(self: &Arc<Self>, epoch: u64) -> Result<BatchEnd, SessionError> {
        self.with(|source| match source.pressure() {
            Some(_) if !source.is_armed() => Err(SessionError::NotArmed),
            _ => source.barrier(epoch),
        })
    }

    /// Does something with the source, and what follows from it.
    pub(super) fn with<T>(self: &Arc<Self>, f: impl FnOnce(&mut Source) -> T) -> T {
        let mut state = self.lock();
        let result = f(&mut state.source);
        self.act(state);
        result
    }
}
