//! A primary that has slept through its detection time does not know what became of its copy: the words that told it may have been lost
//! with the connection while it stood still. Before it takes the backup for lost it asks (hazard F6). Sans-IO.

use std::time::{Duration, Instant};

/// How long after a sleep a loss is asked about, at least: the link takes its time to end.
const AFTER: Duration = Duration::from_secs(10);

/// Notices that this host has slept, from the times at which it heard of the link.
#[derive(Debug)]
pub struct Sleep {
    detection: Duration,
    last: Instant,
    woke: Option<Instant>,
}

impl Sleep {
    /// For a link with this detection time, which begins now.
    #[must_use]
    pub fn new(detection: Duration, now: Instant) -> Self {
        Self { detection, last: now, woke: None }
    }

    /// Something of the link was heard. A host that is awake hears at least of the silence, when the detection time is over.
    pub fn heard(&mut self, now: Instant) {
        if now.saturating_duration_since(self.last) > self.detection * 3 / 2 {
            self.woke = Some(now);
        }
        self.last = now;
    }

    /// This host's own timers were late by so much. In less than the detection time nobody can have taken us for lost.
    pub fn starved(&mut self, by: Duration, now: Instant) {
        if by >= self.detection {
            self.woke = Some(now);
        }
    }

    /// Whether a loss that shows now may be one of which we have slept through the reason.
    #[must_use]
    pub fn doubts(&self, now: Instant) -> bool {
        let window = AFTER.max(self.detection * 3);
        self.woke.is_some_and(|woke| now.saturating_duration_since(woke) <= window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DETECTION: Duration = Duration::from_secs(1);

    #[test]
    fn only_who_has_slept_doubts() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut sleep = Sleep::new(DETECTION, start);
        (1..20).for_each(|beat| sleep.heard(at(beat * 125)));
        // The silence of a dead backup is told within the detection time and an eighth.
        sleep.heard(at(19 * 125 + 1125));
        assert!(!sleep.doubts(at(19 * 125 + 1125)));
        sleep.heard(at(60_000));
        assert!(sleep.doubts(at(60_000)) && sleep.doubts(at(69_000)));
        assert!(!sleep.doubts(at(71_000)), "it has been awake for long");
        sleep.starved(DETECTION * 3 / 4, at(80_000));
        assert!(!sleep.doubts(at(80_100)));
        sleep.starved(DETECTION, at(81_000));
        assert!(sleep.doubts(at(81_100)));
    }
}
