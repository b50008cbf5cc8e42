//! The stall meter: a tight loop over the TSC that notes every gap.
//!
//! `CLOCK_MONOTONIC` stands still while Xen has the guest suspended, the TSC
//! does not, so only the TSC shows what a checkpoint costs. After a move to
//! another host the TSC may have been set back or forward by the hypervisor:
//! the gap of a failover itself is for the client to measure.
//!
//! The loop eats a vCPU. On a guest with one vCPU the scheduler's own slices
//! (3-4 ms with another busy thread) and all that the guest's kernel does to
//! freeze and thaw are gaps too. For each gap the part that `CLOCK_MONOTONIC`
//! did not see is told apart: that is the time it stood suspended.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::clock::{monotonic_ns, raw_ns};
use crate::protocol::{Stall, StallReport};
use crate::sys::rdtsc;

/// Gaps kept for the quantiles.
const KEPT: usize = 100_000;
/// Gaps listed in a report.
const LISTED: usize = 1000;

struct Log {
    threshold_ms: f64,
    khz: u64,
    stalls: VecDeque<Stall>,
    count: u64,
    backwards: u64,
    total_ms: f64,
    suspended_ms: f64,
    max_ms: f64,
}

struct Run {
    stop: AtomicBool,
    /// Ticks watched since the last reset.
    watched: AtomicU64,
    log: Mutex<Log>,
}

impl Run {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, running: bool, reset: bool) -> StallReport {
        let mut log = self.log();
        let mut sorted: Vec<f64> = log.stalls.iter().map(|s| s.ms).collect();
        sorted.sort_by(f64::total_cmp);
        let quantile = |q: f64| match sorted.len() {
            0 => 0.0,
            n => sorted[((n as f64 * q).ceil() as usize).clamp(1, n) - 1],
        };
        let report = StallReport {
            running,
            threshold_ms: log.threshold_ms,
            watched_ms: self.watched.load(Ordering::Relaxed) as f64 / log.khz as f64,
            tsc_khz: log.khz,
            count: log.count,
            backwards: log.backwards,
            total_ms: log.total_ms,
            suspended_ms: log.suspended_ms,
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            max_ms: log.max_ms,
            stalls: log.stalls.iter().skip(log.stalls.len().saturating_sub(LISTED)).copied().collect(),
        };
        if reset {
            log.stalls.clear();
            (log.count, log.backwards) = (0, 0);
            (log.total_ms, log.suspended_ms, log.max_ms) = (0.0, 0.0, 0.0);
            self.watched.store(0, Ordering::Relaxed);
        }
        report
    }
}

/// The meter; off until started.
#[derive(Default)]
pub struct StallMeter {
    run: Mutex<Option<Arc<Run>>>,
}

impl StallMeter {
    /// Calibrates the TSC (50 ms) and starts the loop with gaps from
    /// `threshold_ms` up; what an earlier run saw is forgotten.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(&self, threshold_ms: f64) -> std::io::Result<StallReport> {
        let mut slot = self.slot();
        if let Some(old) = slot.take() {
            old.stop.store(true, Ordering::Relaxed);
        }
        let run = Arc::new(Run {
            stop: AtomicBool::new(false),
            watched: AtomicU64::new(0),
            log: Mutex::new(Log {
                threshold_ms,
                khz: calibrate_khz(),
                stalls: VecDeque::new(),
                count: 0,
                backwards: 0,
                total_ms: 0.0,
                suspended_ms: 0.0,
                max_ms: 0.0,
            }),
        });
        let theirs = Arc::clone(&run);
        thread::Builder::new().name("stall".into()).spawn(move || watch(&theirs))?;
        let report = run.report(true, false);
        *slot = Some(run);
        Ok(report)
    }

    /// What was seen so far; `None` if never started.
    pub fn read(&self, reset: bool) -> Option<StallReport> {
        let slot = self.slot();
        slot.as_ref().map(|run| run.report(!run.stop.load(Ordering::Relaxed), reset))
    }

    /// Stops the loop; what it saw stays readable.
    pub fn stop(&self) -> Option<StallReport> {
        let slot = self.slot();
        slot.as_ref().map(|run| {
            run.stop.store(true, Ordering::Relaxed);
            run.report(false, false)
        })
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Run>>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watch(run: &Run) {
    let (threshold, khz) = {
        let log = run.log();
        ((log.threshold_ms * log.khz as f64) as u64, log.khz)
    };
    let mut last = rdtsc();
    // Renewed every millisecond.
    let mut both = both_clocks(khz);
    while !run.stop.load(Ordering::Relaxed) {
        let now = rdtsc();
        if let Some(gap) = now.checked_sub(last) {
            run.watched.fetch_add(gap, Ordering::Relaxed);
            if gap >= threshold {
                let after = both_clocks(khz);
                let by_tsc = after.0.saturating_sub(both.0) as f64 / khz as f64;
                let by_clock = after.1.saturating_sub(both.1) as f64 / 1e6;
                let ms = gap as f64 / khz as f64;
                let suspended_ms = (by_tsc - by_clock).clamp(0.0, ms);
                note(run, Some(Stall { t_ns: after.1, ms, suspended_ms }));
                both = after;
            } else if now.saturating_sub(both.0) > khz {
                both = both_clocks(khz);
            }
        } else {
            note(run, None);
            both = both_clocks(khz);
        }
        last = now;
    }
}

/// One moment by TSC and `CLOCK_MONOTONIC`. Reading the clock takes long enough
/// to be interrupted in the middle: such a pair is thrown away.
fn both_clocks(khz: u64) -> (u64, u64) {
    let mut best = (u64::MAX, (0, 0));
    for _ in 0..5 {
        let before = rdtsc();
        let t_ns = monotonic_ns();
        let after = rdtsc();
        let took = after.saturating_sub(before);
        if took < best.0 {
            best = (took, (before + took / 2, t_ns));
        }
        if took < khz / 5 {
            break;
        }
    }
    best.1
}

/// Notes one gap, or (`None`) one step backwards.
fn note(run: &Run, stall: Option<Stall>) {
    let mut log = run.log();
    let Some(stall) = stall else {
        log.backwards += 1;
        return;
    };
    log.count += 1;
    log.total_ms += stall.ms;
    log.suspended_ms += stall.suspended_ms;
    log.max_ms = log.max_ms.max(stall.ms);
    if log.stalls.len() == KEPT {
        log.stalls.pop_front();
    }
    log.stalls.push_back(stall);
}

/// Frequency of the TSC, the median of five windows of 10 ms: one that a
/// suspend falls into (the TSC sees it, the clock does not) is outvoted.
fn calibrate_khz() -> u64 {
    let mut rates: Vec<u64> = (0..5)
        .map(|_| {
            let (t0, c0) = (raw_ns(), rdtsc());
            let mut t1 = t0;
            while t1 < t0 + 10_000_000 {
                t1 = raw_ns();
            }
            rdtsc().saturating_sub(c0).saturating_mul(1_000_000) / (t1 - t0)
        })
        .collect();
    rates.sort_unstable();
    rates[2].max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn the_tsc_agrees_with_the_clock() {
        let khz = calibrate_khz();
        let (t, c) = (Instant::now(), rdtsc());
        thread::sleep(Duration::from_millis(200));
        let by_tsc = (rdtsc() - c) as f64 / khz as f64;
        let by_clock = t.elapsed().as_secs_f64() * 1000.0;
        assert!((by_tsc / by_clock - 1.0).abs() < 0.05, "{by_tsc} ms by TSC, {by_clock} ms by the clock");
    }

    #[test]
    fn gaps_are_counted_reported_and_reset() {
        let meter = StallMeter::default();
        assert_eq!(meter.read(false), None);
        // So low a threshold that an interrupt is a stall.
        assert!(meter.start(0.01).expect("a thread").running);
        let end = Instant::now() + Duration::from_secs(20);
        let report = loop {
            let r = meter.read(true).expect("started");
            if r.count > 2 {
                break r;
            }
            assert!(Instant::now() < end, "no interrupt in 20 s?");
            thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(report.stalls.len() as u64, report.count.min(LISTED as u64));
        assert!(report.p50_ms >= 0.01 && report.p50_ms <= report.p99_ms && report.p99_ms <= report.max_ms);
        assert!(report.total_ms <= report.watched_ms * 1.01, "{report:?}");
        assert!(meter.read(false).expect("started").count < report.count + 1000);
        // Nobody suspends this machine.
        assert!(report.suspended_ms < report.total_ms * 0.1 + 1.0, "{report:?}");
        let last = meter.stop().expect("started");
        assert!(!last.running);
        assert!(!meter.read(false).expect("started").running);
    }

    #[test]
    fn quantiles_are_those_of_the_noted_gaps() {
        let run = Run {
            stop: AtomicBool::new(true),
            watched: AtomicU64::new(1_000_000),
            log: Mutex::new(Log {
                threshold_ms: 1.0,
                khz: 1000,
                stalls: VecDeque::new(),
                count: 0,
                backwards: 0,
                total_ms: 0.0,
                suspended_ms: 0.0,
                max_ms: 0.0,
            }),
        };
        for ms in 1..=100 {
            note(&run, Some(Stall { t_ns: 0, ms: f64::from(ms), suspended_ms: 0.5 }));
        }
        note(&run, None);
        let r = run.report(false, true);
        assert_eq!((r.count, r.backwards, r.p50_ms, r.p99_ms, r.max_ms), (100, 1, 50.0, 99.0, 100.0));
        assert_eq!((r.total_ms, r.suspended_ms, r.watched_ms), (5050.0, 50.0, 1000.0));
        let r = run.report(false, false);
        assert_eq!((r.count, r.backwards, r.p50_ms, r.max_ms, r.watched_ms), (0, 0, 0.0, 0.0, 0.0));
    }
}
