//! The memory dirtier and its check.
//!
//! The region is checked against a shadow (the version each page must have),
//! which lives elsewhere in memory: a page that a restore lost, mixed up or
//! tore cannot look right by agreeing with itself.

use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::pattern::{self, WORDS};
use crate::protocol::{BadPage, DirtyInfo, DirtySpec, Order, Verdict};
use crate::sys::Region;

/// Pages verified while the dirtier is kept waiting.
const VERIFY_CHUNK: usize = 256;
/// The dirtier works in bursts this far apart.
const TICK: Duration = Duration::from_millis(5);
/// It makes up for at most this much lost time.
const CATCH_UP: Duration = Duration::from_millis(100);
/// Memory left to the kernel and the servers.
const RESERVE_KB: u64 = 16 * 1024;

/// Why the dirtier could not do as told.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The guest has not that much memory.
    #[error("{wanted_mb} MiB asked for, but only {available_mb} MiB are available; ask for less")]
    NoRoom {
        /// What was asked for.
        wanted_mb: usize,
        /// What can be had.
        available_mb: u64,
    },
    /// The kernel refused.
    #[error("mapping the region: {0}")]
    Map(#[from] std::io::Error),
    /// `verify` before `dirty`.
    #[error("nothing to verify: no dirty command yet")]
    NoRegion,
}

struct Memory {
    region: Region,
    spec: DirtySpec,
    /// Version that each page must have.
    shadow: Vec<u64>,
    /// Version of the last full filling.
    base: u64,
    seed: u64,
    cursor: usize,
    written: u64,
    missed: u64,
}

impl Memory {
    fn new(spec: DirtySpec, seed: u64) -> Result<Self, DirtyError> {
        let bytes = spec.mem_mb << 20;
        let region = Region::new(NonZeroUsize::new(bytes).unwrap_or(NonZeroUsize::MIN))?;
        let shadow = vec![0; bytes / 4096];
        let mut it = Self { region, spec, shadow, base: 0, seed, cursor: 0, written: 0, missed: 0 };
        it.fill();
        Ok(it)
    }

    fn len(&self) -> usize {
        self.spec.bytes_per_page.div_ceil(8).clamp(pattern::HEADER + 1, WORDS)
    }

    /// Writes every word of every page, as a version of its own.
    fn fill(&mut self) {
        self.base = self.shadow.iter().copied().max().unwrap_or(0) + 1;
        for (page, words) in self.region.words_mut().chunks_exact_mut(WORDS).enumerate() {
            pattern::write(words, self.seed, page as u64, self.base, WORDS);
            self.shadow[page] = self.base;
        }
    }

    fn touch_next(&mut self, random: &mut u64) {
        let pages = self.shadow.len();
        let page = match self.spec.order {
            Order::Seq => {
                self.cursor = (self.cursor + 1) % pages;
                self.cursor
            }
            Order::Rand => {
                *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                usize::try_from(pattern::mix(*random) % pages as u64).unwrap_or(0)
            }
        };
        let len = self.len();
        let version = self.shadow[page] + 1;
        let words = &mut self.region.words_mut()[page * WORDS..(page + 1) * WORDS];
        pattern::write(words, self.seed, page as u64, version, len);
        self.shadow[page] = version;
        self.written += 1;
    }

    fn check(&self, page: usize) -> Option<BadPage> {
        let words = &self.region.words()[page * WORDS..(page + 1) * WORDS];
        let expected = self.shadow[page];
        pattern::fault(words, self.seed, page as u64, expected, self.len(), self.base).map(|why| BadPage {
            page,
            expected,
            found: words[1],
            why,
        })
    }

    fn info(&self) -> DirtyInfo {
        DirtyInfo {
            spec: Some(self.spec),
            pages: self.shadow.len(),
            written: self.written,
            missed: self.missed,
            locked: self.region.locked(),
        }
    }
}

#[derive(Default)]
struct Shared {
    memory: Mutex<Option<Memory>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The dirtier: one region, one thread.
#[derive(Clone, Default)]
pub struct Dirtier {
    shared: Arc<Shared>,
}

impl Dirtier {
    /// Starts the thread, idle.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start() -> std::io::Result<Self> {
        let it = Self::default();
        let shared = Arc::clone(&it.shared);
        thread::Builder::new().name("dirty".into()).spawn(move || dirty_loop(&shared))?;
        Ok(it)
    }

    /// Starts, changes or (rate 0) pauses the dirtying. Blocks while the
    /// region is filled, when it is new or `bytes_per_page` changed.
    ///
    /// # Errors
    /// See [`DirtyError`].
    pub fn order(&self, spec: DirtySpec) -> Result<DirtyInfo, DirtyError> {
        let mut memory = self.shared.lock();
        match memory.as_mut() {
            Some(m) if m.spec.mem_mb == spec.mem_mb => {
                let refill = m.spec.bytes_per_page != spec.bytes_per_page;
                m.spec = spec;
                if refill {
                    m.fill();
                }
            }
            _ => {
                *memory = None;
                let available_kb = crate::server::mem_kb().available_kb.saturating_sub(RESERVE_KB);
                if available_kb < (spec.mem_mb as u64) << 10 {
                    return Err(DirtyError::NoRoom { wanted_mb: spec.mem_mb, available_mb: available_kb >> 10 });
                }
                *memory = Some(Memory::new(spec, crate::sys::rdtsc())?);
            }
        }
        self.shared.changed.notify_all();
        Ok(memory.as_ref().map_or(NOTHING, Memory::info))
    }

    /// What the dirtier does.
    pub fn info(&self) -> DirtyInfo {
        self.shared.lock().as_ref().map_or(NOTHING, Memory::info)
    }

    /// Checks every page; dirtying goes on in between.
    ///
    /// # Errors
    /// There is no region yet.
    pub fn verify(&self) -> Result<Verdict, DirtyError> {
        let mut verdict = Verdict { pages: 0, bad_pages: 0, bad: Vec::new() };
        let mut next = 0;
        loop {
            let guard = self.shared.lock();
            let memory = guard.as_ref().ok_or(DirtyError::NoRegion)?;
            let end = (next + VERIFY_CHUNK).min(memory.shadow.len());
            for bad in (next..end).filter_map(|page| memory.check(page)) {
                verdict.bad_pages += 1;
                if verdict.bad.len() < 32 {
                    verdict.bad.push(bad);
                }
            }
            verdict.pages = end;
            next = end;
            if end == memory.shadow.len() {
                return Ok(verdict);
            }
        }
    }

    /// Damages one page, for tests of `verify`.
    #[cfg(test)]
    fn damage(&self, f: impl FnOnce(&mut [u64])) {
        f(self.shared.lock().as_mut().expect("a region").region.words_mut());
    }
}

const NOTHING: DirtyInfo = DirtyInfo { spec: None, pages: 0, written: 0, missed: 0, locked: false };

fn dirty_loop(shared: &Shared) {
    let mut random = crate::sys::rdtsc();
    let mut last = Instant::now();
    let mut owed = 0.0;
    loop {
        let mut guard = shared.lock();
        let rate = guard.as_ref().map_or(0, |m| m.spec.pages_per_sec);
        let (Some(memory), true) = (guard.as_mut(), rate > 0) else {
            drop(shared.changed.wait(guard).unwrap_or_else(PoisonError::into_inner));
            last = Instant::now();
            owed = 0.0;
            continue;
        };
        let now = Instant::now();
        owed += now.duration_since(last).as_secs_f64() * rate as f64;
        last = now;
        let most = CATCH_UP.as_secs_f64() * rate as f64 + 1.0;
        if owed > most {
            memory.missed += (owed - most) as u64;
            owed = most;
        }
        // Short enough to leave the lock, and the CPU, to others in between.
        let until = now + TICK;
        while owed >= 1.0 && Instant::now() < until {
            for _ in 0..(owed as u64).min(16) {
                memory.touch_next(&mut random);
                owed -= 1.0;
            }
        }
        drop(guard);
        thread::sleep(if owed >= 1.0 { Duration::from_micros(50) } else { TICK });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(pages_per_sec: u64, bytes_per_page: usize, order: Order) -> DirtySpec {
        DirtySpec { pages_per_sec, bytes_per_page, order, mem_mb: 2 }
    }

    fn wait_written(d: &Dirtier, n: u64) {
        let end = Instant::now() + Duration::from_secs(20);
        while d.info().written < n {
            assert!(Instant::now() < end, "the dirtier stands still: {:?}", d.info());
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_was_written_verifies_while_it_is_written() {
        let d = Dirtier::start().expect("a thread");
        assert!(matches!(d.verify(), Err(DirtyError::NoRegion)));
        for (bytes, order) in [(64, Order::Seq), (64, Order::Rand), (4096, Order::Rand), (1000, Order::Seq)] {
            let before = d.info().written;
            let info = d.order(spec(50_000, bytes, order)).expect("2 MiB");
            assert_eq!(info.pages, 512);
            wait_written(&d, before + 600);
            let verdict = d.verify().expect("a region");
            assert_eq!((verdict.pages, verdict.bad_pages), (512, 0), "{verdict:?}");
        }
        d.order(spec(0, 1000, Order::Seq)).expect("2 MiB");
        let stopped = d.info().written;
        thread::sleep(TICK * 4);
        assert_eq!(d.info().written, stopped);
    }

    #[test]
    fn lost_swapped_torn_and_flipped_pages_are_found() {
        let d = Dirtier::start().expect("a thread");
        d.order(spec(50_000, 512, Order::Seq)).expect("2 MiB");
        wait_written(&d, 1200);
        d.order(spec(0, 512, Order::Seq)).expect("2 MiB");
        d.damage(|words| {
            let page = |n: usize| n * WORDS..(n + 1) * WORDS;
            words[page(3)].fill(0); // lost
            words.copy_within(page(8), 7 * WORDS); // another page's contents
            let old = words[10 * WORDS + 1] - 1; // an old version of the page, right in itself
            pattern::write(&mut words[page(10)], 0, 10, old, 64);
            words[20 * WORDS + 40] ^= 1; // within what the last write wrote
            words[21 * WORDS + 500] ^= 1 << 63; // beyond it
            words[22 * WORDS + 3] ^= 1; // only the sum
        });
        let verdict = d.verify().expect("a region");
        let pages: Vec<usize> = verdict.bad.iter().map(|b| b.page).collect();
        assert_eq!(pages, [3, 7, 10, 20, 21, 22], "{verdict:?}");
        assert_eq!(verdict.bad_pages, 6);
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        let d = Dirtier::start().expect("a thread");
        let huge = DirtySpec { mem_mb: 1 << 20, ..spec(1, 64, Order::Seq) };
        assert!(matches!(d.order(huge), Err(DirtyError::NoRoom { .. })));
    }
}
