//! The newest finished epochs with when each part of them was: what `remus trace` draws.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::report::EpochReport;

/// So many epochs of a protection are kept.
pub const KEPT: usize = 64;

/// A finished epoch on this host's clock. What is not told here follows from the report, part after part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedEpoch {
    /// When the guest was asked to suspend, in microseconds since the Unix epoch. All epochs of one answer are on the clock as it was then,
    /// so that one that was set meanwhile does not tear them apart.
    pub start_us: u64,
    /// From the start until the first captured item went to the link, in microseconds; none when nothing of that is known.
    pub encode_at_us: Option<u64>,
    /// From the start until the devices were told to commit, in microseconds.
    pub commit_at_us: u64,
    /// How long everything took.
    pub report: EpochReport,
}

/// As the driver measures it.
#[derive(Clone, Debug)]
pub struct Finished {
    /// When the guest was asked to suspend.
    pub asked: Instant,
    /// When the first captured item went to the link.
    pub encoding: Option<Instant>,
    /// When the devices were told to commit.
    pub committing: Instant,
    /// How long everything took.
    pub report: EpochReport,
}

/// The newest epochs of one protection.
#[derive(Debug, Default)]
pub struct Ring {
    kept: Mutex<VecDeque<Finished>>,
}

impl Ring {
    /// Keeps an epoch, in place of the oldest when there are [`KEPT`].
    pub fn push(&self, epoch: Finished) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(epoch);
    }

    /// The newest epochs, `count` at most, oldest first, on the clock that shows `clock` at `now`.
    #[must_use]
    pub fn newest(&self, count: usize, now: Instant, clock: SystemTime) -> Vec<TracedEpoch> {
        let clock = clock.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let older = kept.len().saturating_sub(count);
        kept.iter().skip(older).map(|epoch| epoch.at(now, clock)).collect()
    }
}

impl Finished {
    fn at(&self, now: Instant, clock_us: u64) -> TracedEpoch {
        let after = |at: Instant| at.saturating_duration_since(self.asked).as_micros() as u64;
        // Rounded up, as durations are rounded down: so an epoch never reaches into the next.
        let ago = now.saturating_duration_since(self.asked).as_micros() as u64;
        TracedEpoch {
            start_us: clock_us.saturating_sub(ago),
            encode_at_us: self.encoding.map(after),
            commit_at_us: after(self.committing),
            report: self.report.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ids::Epoch;

    fn finished(epoch: u64, asked: Instant) -> Finished {
        let report = EpochReport { epoch: Epoch(epoch), ..EpochReport::default() };
        let ms = Duration::from_millis;
        Finished { asked, encoding: Some(asked + ms(2)), committing: asked + ms(9), report }
    }

    #[test]
    fn only_the_newest_are_kept_and_they_come_oldest_first() {
        let (ring, begin) = (Ring::default(), Instant::now());
        for epoch in 0..KEPT as u64 + 3 {
            ring.push(finished(epoch, begin + Duration::from_millis(100 * epoch)));
        }
        let numbers = |count| {
            let newest = ring.newest(count, begin + Duration::from_secs(60), UNIX_EPOCH + Duration::from_secs(1000));
            newest.iter().map(|epoch| epoch.report.epoch.0).collect::<Vec<_>>()
        };
        assert_eq!(numbers(3), [64, 65, 66]);
        assert_eq!(numbers(1000), (3..67).collect::<Vec<_>>());
        assert_eq!(numbers(0), [0; 0]);
    }

    #[test]
    fn times_are_those_of_the_clock_at_the_question() {
        let (ring, begin) = (Ring::default(), Instant::now());
        ring.push(finished(1, begin));
        ring.push(Finished { encoding: None, ..finished(2, begin + Duration::from_millis(100)) });
        let told = ring.newest(9, begin + Duration::from_secs(1), UNIX_EPOCH + Duration::from_secs(1000));
        let times: Vec<_> = told.iter().map(|e| (e.start_us, e.encode_at_us, e.commit_at_us)).collect();
        assert_eq!(times, [(999_000_000, Some(2000), 9000), (999_100_000, None, 9000)]);
    }
}
