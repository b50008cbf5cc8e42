//! Many seeds on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::coverage::Coverage;
use super::oracle::Violation;
use super::plan::Plan;
use super::world::World;

/// Seeds that a thread takes at once.
const CHUNK: u64 = 64;

/// What many runs have shown.
#[derive(Debug, Default)]
pub struct Summary {
    /// Runs that were made.
    pub runs: u64,
    /// Simulated events.
    pub events: u64,
    /// Simulated time, in microseconds.
    pub time: u64,
    /// Sums of what happened in the runs.
    pub tally: Tally,
    /// The violation of the lowest seed that has one.
    pub violation: Option<(u64, Violation)>,
    /// States and events that met.
    pub coverage: Coverage,
}

/// What happened in a run, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Epochs acknowledged.
    pub acked: u64,
    /// Copies started from an epoch.
    pub started: u64,
    /// Requests that the client got an answer to.
    pub answers: u64,
}

impl Summary {
    fn add(&mut self, seed: u64, world: &mut World) {
        self.runs += 1;
        self.events += world.events;
        self.time += world.now;
        let tally = world.tally();
        self.tally.acked += tally.acked;
        self.tally.started += tally.started;
        self.tally.answers += tally.answers;
        if let Some(violation) = world.oracle.violation.take()
            && self.violation.as_ref().is_none_or(|(other, _)| seed < *other)
        {
            self.violation = Some((seed, violation));
        }
        for (what, times) in world.coverage.take().unwrap_or_default() {
            *self.coverage.entry(what).or_default() += times;
        }
    }

    fn join(&mut self, other: Self) {
        self.runs += other.runs;
        self.events += other.events;
        self.time += other.time;
        self.tally.acked += other.tally.acked;
        self.tally.started += other.tally.started;
        self.tally.answers += other.tally.answers;
        if let Some((seed, violation)) = other.violation
            && self.violation.as_ref().is_none_or(|(mine, _)| seed < *mine)
        {
            self.violation = Some((seed, violation));
        }
        for (what, times) in other.coverage {
            *self.coverage.entry(what).or_default() += times;
        }
    }
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// The first seed.
    pub start: u64,
    /// How many.
    pub seeds: u64,
    /// Threads.
    pub jobs: usize,
    /// Whether to count which states and events meet.
    pub coverage: bool,
    /// The line that is taken away. Only with the feature `mutants` can one be.
    pub without: Option<&'static str>,
}

/// Runs the plans of `order.seeds` seeds until all are run or one shows a violation. `progress` is told now and then how many are done.
pub fn campaign(order: Order, progress: &(dyn Fn(u64) + Sync)) -> Summary {
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let summary = Mutex::new(Summary::default());
    let work = || {
        let mut mine = Summary::default();
        #[cfg(feature = "mutants")]
        crate::enforced::take_away(order.without);
        while !stop.load(Ordering::Relaxed) {
            let from = next.fetch_add(CHUNK, Ordering::Relaxed);
            if from >= order.seeds {
                break;
            }
            let to = (from + CHUNK).min(order.seeds);
            for seed in order.start + from..order.start + to {
                let mut world = World::new(&Plan::of(seed));
                world.coverage = order.coverage.then(Coverage::new);
                world.run();
                mine.add(seed, &mut world);
                if mine.violation.is_some() {
                    stop.store(true, Ordering::Relaxed);
                    break;
                }
            }
            progress(done.fetch_add(to - from, Ordering::Relaxed) + to - from);
        }
        #[cfg(feature = "mutants")]
        crate::enforced::take_away(None);
        summary.lock().unwrap_or_else(std::sync::PoisonError::into_inner).join(mine);
    };
    std::thread::scope(|scope| {
        for _ in 1..order.jobs.max(1) {
            scope.spawn(work);
        }
        work();
    });
    summary.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
