//! When an epoch ends: the rule between the release of one epoch's output and the suspend of the next (sans-IO).
//!
//! With a fixed interval that is all there is to it. With [`AutoInterval`] output that waits ends the epoch as soon as it may, a guest
//! that writes much ends it before shipping takes long, and a quiet guest runs for the longest interval. No rule of safety depends on
//! any of this: what is held stays held until its epoch is acknowledged, whenever that epoch ends.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::options::{AutoInterval, ProtectOptions};
use crate::stream::PAGE_SIZE;

/// With [`AutoInterval`] a guest runs at least as long as its last checkpoint took it: it loses at most this share of its time, in
/// percent. (A disk that wants the epoch to end does not wait for that.)
pub const SHARE: u32 = 50;

/// So many pages, 16 MiB, are never a reason to end an epoch.
const FEW: u64 = 4096;

/// The mean is over so many intervals.
const KEPT: usize = 16;

/// Why an epoch was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutBy {
    /// The interval was over.
    Timer,
    /// Output waited.
    Output,
    /// So much was written, by the epoch before, that shipping it would take long.
    Pages,
    /// A disk's log of the epoch was filling up.
    Disk,
}

/// The intervals of one protection, for status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IntervalReport {
    /// Whether epochs are ended by need, and not by the timer alone.
    pub auto: bool,
    /// Mean of the latest ones (16 at most), from the release of one epoch to the suspend of the next, in milliseconds.
    pub mean_ms: Option<u64>,
    /// Epochs ended because the interval was over.
    pub by_timer: u64,
    /// Because output waited.
    pub by_output: u64,
    /// Because much had been written.
    pub by_pages: u64,
    /// Because a disk's log was filling up.
    pub by_disk: u64,
}

/// An epoch that was just released.
#[derive(Clone, Copy, Debug)]
pub struct Released {
    /// When.
    pub now: Instant,
    /// When its suspend was asked for.
    pub suspend_asked: Instant,
    /// When the guest ran again.
    pub resumed: Instant,
    /// Capturing, sending and the acknowledgement: what its output has waited for.
    pub shipped: Duration,
    /// Its pages.
    pub pages: u64,
}

/// What the epoch before the one under way has shown.
#[derive(Clone, Copy, Debug)]
struct Past {
    released: Instant,
    resumed: Instant,
    stalled: Duration,
    /// How long the guest had run in it; unknown for the first.
    ran: Option<Duration>,
    shipped: Duration,
    pages: u64,
}

/// Decides when the epoch under way ends.
#[derive(Debug)]
pub struct Pace {
    auto: Option<AutoInterval>,
    interval: Duration,
    /// Half of what an epoch may have.
    most_pages: u64,
    past: Option<Past>,
    output: bool,
    disk: bool,
    gaps: VecDeque<Duration>,
    report: IntervalReport,
}

impl Pace {
    /// Nothing was released yet.
    #[must_use]
    pub fn new(options: &ProtectOptions) -> Self {
        Self {
            auto: options.auto_interval,
            interval: options.longest_interval(),
            most_pages: (options.epoch_budget / 2 / PAGE_SIZE as u64).max(FEW),
            past: None,
            output: false,
            disk: false,
            gaps: VecDeque::with_capacity(KEPT),
            report: IntervalReport { auto: options.auto_interval.is_some(), ..IntervalReport::default() },
        }
    }

    /// The output of an epoch was released: from here on the next one may end.
    pub fn released(&mut self, epoch: Released) {
        let Released { now, suspend_asked, resumed, shipped, pages } = epoch;
        let ran = self.past.map(|past| suspend_asked.saturating_duration_since(past.resumed));
        let stalled = resumed.saturating_duration_since(suspend_asked);
        self.past = Some(Past { released: now, resumed, stalled, ran, shipped, pages });
        self.disk = false;
    }

    /// Output of the epoch under way waits.
    pub fn output_waits(&mut self) {
        self.output = true;
    }

    /// A disk wants the epoch to end.
    pub fn disk_waits(&mut self) {
        self.disk = true;
    }

    /// The guest is suspended: output from here on is the next epoch's.
    pub fn closed(&mut self) {
        self.output = false;
    }

    /// When to suspend the guest, as far as known now, and why. `None` before the first release.
    #[must_use]
    pub fn due(&self) -> Option<(Instant, CutBy)> {
        let past = self.past?;
        let by_disk = self.disk.then_some((past.released, CutBy::Disk));
        let timer = past.released + self.interval;
        let Some(auto) = self.auto else { return by_disk.or(Some((timer, CutBy::Timer))) };
        let rest = past.resumed + past.stalled * (100 - SHARE) / SHARE;
        let earliest = rest.max(past.released + Duration::from_millis(auto.min_gap_ms));
        let by_output = self.output.then_some((earliest, CutBy::Output));
        let by_pages = self.full(&past).map(|at| (at.max(earliest), CutBy::Pages));
        let by_timer = Some((timer.max(earliest), CutBy::Timer));
        // Of those that come at the same time the first.
        [by_disk, by_output, by_pages, by_timer].into_iter().flatten().min_by_key(|due| due.0)
    }

    /// When the epoch has so many pages that its output would wait for them for half of the longest interval, or that half of the
    /// budget is used, if it goes on as the one before. That one tells only about an epoch of up to twice its pages: what a guest
    /// writes to in a short time it goes on writing to.
    fn full(&self, past: &Past) -> Option<Instant> {
        let ran = past.ran?;
        let shipped = past.shipped.as_micros().max(1);
        let in_time = self.interval.as_micros() / 2 * u128::from(past.pages) / shipped;
        let limit = u64::try_from(in_time).unwrap_or(u64::MAX).clamp(FEW, self.most_pages);
        (past.pages * 2 >= limit).then(|| past.resumed + ran.mul_f64(limit as f64 / past.pages as f64))
    }

    /// The guest is to be suspended now, as was due: counts it.
    pub fn cut(&mut self, now: Instant) {
        let (Some(past), Some((_, by))) = (self.past, self.due()) else { return };
        let count = match by {
            CutBy::Timer => &mut self.report.by_timer,
            CutBy::Output => &mut self.report.by_output,
            CutBy::Pages => &mut self.report.by_pages,
            CutBy::Disk => &mut self.report.by_disk,
        };
        *count += 1;
        if self.gaps.len() == KEPT {
            self.gaps.pop_front();
        }
        self.gaps.push_back(now.saturating_duration_since(past.released));
        let sum: Duration = self.gaps.iter().sum();
        self.report.mean_ms = Some((sum / self.gaps.len() as u32).as_millis() as u64);
    }

    /// For status.
    #[must_use]
    pub fn report(&self) -> &IntervalReport {
        &self.report
    }
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
