//! What the engine's thread does.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::ahead::Ahead;
use super::batch::{BATCH, Copied};
use super::{AGAIN, NativeConfig, Source};
use crate::capture::buffer::{CapturePause, Shared};
use crate::capture::{CaptureError, EngineCall};
use crate::ids::DomId;
use crate::pool::BufferPool;
use crate::stream::{CaptureItem, PAGE_SIZE};
use crate::xen::XenError;
use crate::xen::foreign::windows::bits;

/// The first copy ends with a suspend after so many rounds, or when a round has fewer pages: as libxenguest does it.
const ROUNDS: u32 = 5;
const FEW: usize = 50;
/// Windows of 4 MiB that are searched for pages given back, per epoch: so many at least, and this part of a large guest's. Until they
/// are found, our mapping keeps them from dom0 and from the guest itself.
const SEARCHED: usize = 4;
const SEARCHED_PART: usize = 128;
/// Buffers that are kept unused at most, of 4 MiB: what the largest epochs of a busy guest take.
const KEEP: usize = 64;

/// The capture is to end: as asked, or because of an error.
enum End {
    Asked,
    Failed(CaptureError),
}

type Outcome<T> = Result<T, End>;

pub(super) struct Worker<S> {
    config: NativeConfig,
    source: S,
    shared: Arc<Shared>,
    calls: UnboundedSender<EngineCall>,
    replies: Receiver<i32>,
    pool: BufferPool,
    /// Pages to copy at the next suspend whatever the log says: a bit each.
    carry: Vec<u64>,
    /// Copied ahead in this epoch.
    ahead: Vec<Copied>,
    judge: Ahead,
    gfns: Vec<u64>,
    /// A page was given back: everything is to be mapped anew.
    remap: bool,
    /// What was mapped while the guest ran is yet to be compared with what there is.
    unchecked: bool,
}

impl<S: Source> Worker<S> {
    pub(super) fn new(
        config: NativeConfig,
        source: S,
        shared: Arc<Shared>,
        calls: UnboundedSender<EngineCall>,
        replies: Receiver<i32>,
    ) -> Self {
        let keep = KEEP.min(config.budget.hard / (BATCH * PAGE_SIZE));
        Self {
            config,
            source,
            shared,
            calls,
            replies,
            pool: BufferPool::new(keep.max(1)),
            carry: Vec::new(),
            ahead: Vec::new(),
            judge: Ahead::default(),
            gfns: Vec::new(),
            remap: false,
            unchecked: true,
        }
    }

    /// Until the capture has ended; log-dirty is off afterwards, and nothing is mapped.
    pub(super) fn run(mut self) {
        let panicked = Panicked { shared: Arc::clone(&self.shared), domid: self.config.domid };
        let outcome = self.capture();
        let error = match outcome {
            Ok(()) | Err(End::Asked) => None,
            Err(End::Failed(error)) => Some(error),
        };
        let failed = error.is_some();
        self.shared.end(error);
        let _ = self.ask(EngineCall::SwitchQemuLogdirty { enable: false });
        if let Err(error) = self.source.log_off()
            && !matches!(error, XenError::NoDomain { .. })
        {
            tracing::error!(domid = %self.config.domid, "log-dirty stays on: {error}");
        }
        let _ = self.ask(EngineCall::Complete { retval: -i32::from(failed), errno: 0 });
        let Self { source, calls, .. } = self;
        drop(source);
        drop(panicked);
        let _ = calls.send(EngineCall::Exited(String::new()));
    }

    fn failed(&self, doing: &'static str, error: &XenError) -> End {
        End::Failed(CaptureError::Native { domid: self.config.domid, doing, cause: error.to_string() })
    }

    /// Says a call and waits for its reply. A driver that is gone counts as 0.
    fn ask(&mut self, call: EngineCall) -> i32 {
        if self.calls.send(call).is_err() {
            return 0;
        }
        self.replies.recv().unwrap_or(0)
    }

    /// As [`ask`](Self::ask); but a capture that is to end goes no further, whatever the reply: it may be nobody's.
    fn ask_on(&mut self, call: EngineCall) -> Outcome<i32> {
        let reply = self.ask(call);
        if self.shared.closing() { Err(End::Asked) } else { Ok(reply) }
    }

    fn push(&self, item: CaptureItem) -> Outcome<()> {
        let bytes = match &item {
            CaptureItem::Pages(batch) => batch.size(),
            CaptureItem::Preamble(bytes) => bytes.len(),
            CaptureItem::State(record) => record.body.len(),
            CaptureItem::EndOfEpoch => 0,
        };
        self.shared.count(bytes);
        // Not wanted any more: a receiver that is gone (the driver hears of that elsewhere), or a stop.
        if !self.shared.push(item) && self.shared.closing() {
            return Err(End::Asked);
        }
        Ok(())
    }

    fn capture(&mut self) -> Outcome<()> {
        let preamble = self.source.preamble().map_err(|e| self.failed("reading the static part", &e))?;
        self.push(CaptureItem::Preamble(preamble))?;
        if self.ask_on(EngineCall::SwitchQemuLogdirty { enable: true })? != 0 {
            return Err(End::Failed(CaptureError::Native {
                domid: self.config.domid,
                doing: "having the device model log its writes",
                cause: "it refused".into(),
            }));
        }
        self.source.log_on().map_err(|e| self.failed("turning log-dirty on", &e))?;
        self.source.map().map_err(|e| self.failed("mapping its memory", &e))?;
        self.first_copy()?;
        loop {
            if self.ask_on(EngineCall::Suspend)? != 1 {
                return Err(End::Asked);
            }
            while self.epoch()? {
                if self.ask_on(EngineCall::Suspend)? != 1 {
                    return Err(End::Asked);
                }
            }
            if self.between()? != 1 {
                return Err(End::Asked);
            }
        }
    }

    /// All of the running guest, and then what it has written to meanwhile, some times over.
    fn first_copy(&mut self) -> Outcome<()> {
        let mut gfns = std::mem::take(&mut self.gfns);
        self.source.windows().list(&mut gfns);
        for round in 0..ROUNDS {
            if round > 0 {
                gfns.clear();
                let read = self.source.dirty(false, &mut |words| bits(words, 0, &mut gfns));
                read.map_err(|e| self.failed("reading the log", &e))?;
                gfns.retain(|gfn| self.source.windows().has(*gfn));
            }
            if round > 0 && gfns.len() < FEW {
                // Too few for a round of their own, but read: they belong to the epoch.
                for gfn in &gfns {
                    set(&mut self.carry, *gfn);
                }
                break;
            }
            for (done, part) in gfns.chunks(BATCH).enumerate() {
                let mut copied = Vec::with_capacity(1);
                Copied::of(self.source.windows(), part, &self.pool, &mut copied);
                for batch in copied.into_iter().filter_map(Copied::batch) {
                    self.push(CaptureItem::Pages(batch))?;
                }
                let _ = self.calls.send(EngineCall::Progress {
                    what: "first copy".into(),
                    done: (done * BATCH + part.len()) as u64,
                    total: gfns.len() as u64,
                });
            }
        }
        self.gfns = gfns;
        Ok(())
    }

    /// The guest stands suspended. Whether the epoch was given up.
    fn epoch(&mut self) -> Outcome<bool> {
        let mut copied = Vec::new();
        let suspended = Instant::now();
        let everything = self.remap_if_stale()?;
        self.list_dirty(everything)?;
        let listed = Instant::now();
        let ahead: usize = self.ahead.iter().map(Copied::pages).sum();
        let need = (self.gfns.len() + ahead) * PAGE_SIZE;
        if need > self.config.budget.hard {
            let limit = self.config.budget.hard;
            return Err(End::Failed(CaptureError::OverBudget { domid: self.config.domid, limit }));
        }
        Copied::of(self.source.windows(), &self.gfns, &self.pool, &mut copied);
        let saved = Instant::now();
        let state = self.source.state().map_err(|e| self.failed("reading vCPU and platform state", &e))?;
        let (log, copy) = (listed - suspended, saved - listed);
        self.shared.paused(CapturePause { log, copy, state: saved.elapsed() });
        let reply = self.ask_on(EngineCall::Postcopy)?;
        // The guest runs again from here on.
        if reply == AGAIN {
            self.carry_on();
            return Ok(true);
        }
        if reply != 1 {
            return Err(End::Asked);
        }
        // What was copied ahead is stale where the tail has it too; the epoch's pages are in `carry` as bits.
        let tail = std::mem::take(&mut self.carry);
        let early = std::mem::take(&mut self.ahead);
        let mut kept = 0;
        for mut part in early {
            part.retain(|gfn| !has(&tail, gfn));
            kept += part.pages();
            if let Some(batch) = part.batch() {
                self.push(CaptureItem::Pages(batch))?;
            }
        }
        self.carry = tail;
        self.carry.fill(0);
        self.judge.saw(self.gfns.len() + kept, ahead, kept);
        for batch in copied.into_iter().filter_map(Copied::batch) {
            self.push(CaptureItem::Pages(batch))?;
        }
        for record in state {
            self.push(CaptureItem::State(record))?;
        }
        self.push(CaptureItem::EndOfEpoch)?;
        Ok(false)
    }

    /// Maps everything anew if a page may have come or gone; then every page counts as dirty, as the log of a page that came under
    /// logging is not to be relied on.
    fn remap_if_stale(&mut self) -> Outcome<bool> {
        let mut stale = self.source.stale().map_err(|e| self.failed("looking at its memory", &e))?;
        if std::mem::take(&mut self.unchecked) && !stale {
            // A page that went before its place was looked at and came back behind that look leaves the count as it was.
            stale = self.source.differs().map_err(|e| self.failed("looking at its memory", &e))?;
        }
        if !stale && !self.remap {
            return Ok(false);
        }
        tracing::info!(domid = %self.config.domid, "the guest's memory has changed places; copying all of it anew");
        self.remap = false;
        self.ahead.clear();
        self.source.map().map_err(|e| self.failed("mapping its memory anew", &e))?;
        Ok(true)
    }

    /// `gfns` and `carry` become all pages to copy now.
    fn list_dirty(&mut self, everything: bool) -> Outcome<()> {
        let carry = &mut self.carry;
        let read = self.source.dirty(true, &mut |words| {
            carry.resize(words.len().max(carry.len()), 0);
            carry.iter_mut().zip(words).for_each(|(carry, word)| *carry |= word);
        });
        read.map_err(|e| self.failed("reading the log", &e))?;
        if everything {
            let mut all = std::mem::take(&mut self.gfns);
            self.source.windows().list(&mut all);
            all.iter().for_each(|gfn| set(&mut self.carry, *gfn));
            self.gfns = all;
        }
        self.gfns.clear();
        bits(&self.carry, 0, &mut self.gfns);
        // A page without contents has nothing to copy: the receiver takes no notice of a page that has gone.
        self.gfns.retain(|gfn| self.source.windows().has(*gfn));
        Ok(())
    }

    /// The epoch was given up: its pages are dirty still (hazard F21). Those of the tail are in `carry` as they were.
    fn carry_on(&mut self) {
        for part in self.ahead.drain(..) {
            part.gfns().iter().for_each(|gfn| set(&mut self.carry, *gfn));
        }
    }

    /// While the guest runs, what the next suspend should not have to wait for.
    fn after(&mut self) {
        let batches = self.gfns.len().div_ceil(BATCH) + 1;
        self.pool.warm(batches, BATCH * PAGE_SIZE);
        let searched = SEARCHED.max(self.source.windows().in_use() / SEARCHED_PART);
        match self.source.given_back(searched) {
            Ok(found) => self.remap |= found,
            // The next suspend will tell.
            Err(error) => tracing::debug!(domid = %self.config.domid, "searching for pages given back: {error}"),
        }
    }

    /// Between two epochs: waits for the reply that begins the next one, and does meanwhile what can be done while the guest runs.
    fn between(&mut self) -> Outcome<i32> {
        // First: the driver ends the epoch on it, and its output waits for that.
        if self.calls.send(EngineCall::Checkpoint).is_err() {
            return Err(End::Asked);
        }
        let began = Instant::now();
        self.after();
        if let Some(after) = self.config.ahead_after
            && self.judge.tries()
        {
            match self.replies.recv_timeout(after.saturating_sub(began.elapsed())) {
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Disconnected) => return Err(End::Asked),
                Err(RecvTimeoutError::Timeout) => self.copy_ahead()?,
            }
        }
        Ok(self.replies.recv().unwrap_or(0))
    }

    fn copy_ahead(&mut self) -> Outcome<()> {
        // A page that came since the last mapping would be copied from the wrong frame: left to the suspended guest.
        if self.remap || self.source.stale().map_err(|e| self.failed("looking at its memory", &e))? {
            self.remap = true;
            return Ok(());
        }
        let mut gfns = std::mem::take(&mut self.gfns);
        gfns.clear();
        let read = self.source.dirty(false, &mut |words| bits(words, 0, &mut gfns));
        read.map_err(|e| self.failed("reading the log", &e))?;
        gfns.retain(|gfn| self.source.windows().has(*gfn));
        // At most half the budget; the rest is left to the tail.
        let room = self.config.budget.hard / 2 / PAGE_SIZE;
        for gfn in gfns.drain(room.min(gfns.len())..) {
            set(&mut self.carry, gfn);
        }
        // What is carried is copied at the suspend; a page in both is left to that.
        Copied::of(self.source.windows(), &gfns, &self.pool, &mut self.ahead);
        self.gfns = gfns;
        Ok(())
    }
}

/// Tells who waits for items that none will come any more, should the thread panic.
struct Panicked {
    shared: Arc<Shared>,
    domid: DomId,
}

impl Drop for Panicked {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = "its thread panicked; see the log".into();
            self.shared.end(Some(CaptureError::Native { domid: self.domid, doing: "capturing", cause }));
        }
    }
}

fn set(words: &mut Vec<u64>, gfn: u64) {
    let word = (gfn / 64) as usize;
    if words.len() <= word {
        words.resize(word + 1, 0);
    }
    words[word] |= 1 << (gfn % 64);
}

fn has(words: &[u64], gfn: u64) -> bool {
    words.get((gfn / 64) as usize).is_some_and(|word| word & 1 << (gfn % 64) != 0)
}
