//! When silence is suspicious. Sans-IO: time comes in, verdicts go out.
//!
//! Suspicion is only liveness: nothing is safe or unsafe because of it (DESIGN R3). It must not be raised because we ourselves
//! were frozen or starved (hazard F22): a late own timer starts the count anew.

use std::time::{Duration, Instant};

use crate::ids::Epoch;

/// A change of the detector's mind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was heard for the whole detection time. Told once until something is heard again.
    Suspect {
        /// How long nothing was heard.
        silence: Duration,
    },
    /// A suspected peer was heard again.
    Alive,
}

/// Tells a silent peer from a talking one. Any received byte is life.
#[derive(Debug)]
pub struct Detector {
    limit: Duration,
    late: Duration,
    heard: Instant,
    ticked: Instant,
    /// Since when no tick was late.
    awake: Instant,
    reading: bool,
    suspect: bool,
}

impl Detector {
    /// A detector that suspects after `limit` of silence and expects [`Detector::tick`] every [`Detector::period`].
    #[must_use]
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, late: limit / 2, heard: now, ticked: now, awake: now, reading: true, suspect: false }
    }

    /// How often to tick: an eighth of the limit, at least 5 ms.
    #[must_use]
    pub fn period(&self) -> Duration {
        (self.limit / 8).max(Duration::from_millis(5))
    }

    /// Bytes came in.
    pub fn heard(&mut self, now: Instant) -> Option<Verdict> {
        self.heard = self.heard.max(now);
        std::mem::take(&mut self.suspect).then_some(Verdict::Alive)
    }

    /// How long nothing was heard; for the peer, which learns so whether it reaches us. Time in which we did not read does not count.
    #[must_use]
    pub fn silence(&self, now: Instant) -> Duration {
        if self.reading { now.saturating_duration_since(self.heard) } else { Duration::ZERO }
    }

    /// Whether we are reading at all: while our own back-pressure keeps us from it, silence says nothing about the peer.
    pub fn set_reading(&mut self, reading: bool, now: Instant) {
        self.reading = reading;
        self.heard = self.heard.max(now);
    }

    /// Whether so much time between two ticks means that we ourselves were starved or frozen.
    #[must_use]
    pub fn starved(&self, since_tick: Duration) -> bool {
        since_tick > self.period() + self.late
    }

    /// How long this host was on time, up to now: none if it is only just waking up. What a peer says that it has not heard can be
    /// laid to the link for so long only; a peer that speaks of more speaks of our freeze, and may have said so before we woke up.
    #[must_use]
    pub fn awake(&self, now: Instant) -> Duration {
        let overdue = self.starved(now.saturating_duration_since(self.ticked));
        if overdue { Duration::ZERO } else { now.saturating_duration_since(self.awake) }
    }

    /// Time passed. Returns a verdict only when it changes.
    pub fn tick(&mut self, now: Instant) -> Option<Verdict> {
        let since_tick = now.saturating_duration_since(self.ticked);
        self.ticked = now;
        let starved = self.starved(since_tick);
        if starved {
            self.awake = now;
        }
        if !self.reading || starved {
            self.heard = self.heard.max(now);
            return None;
        }
        let silence = now.saturating_duration_since(self.heard);
        if self.suspect || silence < self.limit {
            return None;
        }
        self.suspect = true;
        Some(Verdict::Suspect { silence })
    }
}

/// An acknowledgement is overdue although the peer may well be talking (hazard F22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckLate {
    /// The oldest epoch that waits.
    pub epoch: Epoch,
    /// How long nothing moved.
    pub waited: Duration,
}

/// Watches that ended epochs are acknowledged. The count runs from the last progress of sending, so that a large epoch on a
/// slow line is not suspicious while bytes still leave.
#[derive(Debug)]
pub struct AckWatch {
    limit: Duration,
    /// The oldest unacknowledged epoch and the newest one.
    waiting: Option<(Epoch, Epoch)>,
    progress: Instant,
    ticked: Instant,
    told: bool,
}

impl AckWatch {
    /// A watch that complains after `limit` without progress; tick it at least four times per limit.
    #[must_use]
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, waiting: None, progress: now, ticked: now, told: false }
    }

    /// The epoch's end was handed over for sending.
    pub fn ended(&mut self, epoch: Epoch, now: Instant) {
        match &mut self.waiting {
            Some((_, newest)) => *newest = epoch.max(*newest),
            None => {
                self.waiting = Some((epoch, epoch));
                self.progress = now;
            }
        }
    }

    /// A data frame has left.
    pub fn progress(&mut self, now: Instant) {
        self.progress = self.progress.max(now);
        self.told = false;
    }

    /// The peer acknowledged this epoch and all before it.
    pub fn acked(&mut self, epoch: Epoch, now: Instant) {
        if let Some((oldest, newest)) = self.waiting {
            self.waiting = if epoch >= newest { None } else { Some((oldest.max(epoch.next()), newest)) };
            self.progress(now);
        }
    }

    /// Time passed. Complains once per stall.
    pub fn tick(&mut self, now: Instant) -> Option<AckLate> {
        let since_tick = now.saturating_duration_since(self.ticked);
        self.ticked = now;
        if since_tick > self.limit / 2 {
            self.progress = now;
            return None;
        }
        let (epoch, _) = self.waiting?;
        let waited = now.saturating_duration_since(self.progress);
        if self.told || waited < self.limit {
            return None;
        }
        self.told = true;
        Some(AckLate { epoch, waited })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(800);

    fn run(detector: &mut Detector, from: Instant, ticks: u32) -> (Instant, Vec<Verdict>) {
        let mut now = from;
        let mut verdicts = Vec::new();
        for _ in 0..ticks {
            now += detector.period();
            verdicts.extend(detector.tick(now));
        }
        (now, verdicts)
    }

    #[test]
    fn silence_is_told_once_and_life_again() {
        let start = Instant::now();
        let mut detector = Detector::new(LIMIT, start);
        let (now, verdicts) = run(&mut detector, start, 7);
        assert_eq!(verdicts, []);
        let (now, verdicts) = run(&mut detector, now, 5);
        assert_eq!(verdicts, [Verdict::Suspect { silence: LIMIT }]);
        assert_eq!(detector.heard(now), Some(Verdict::Alive));
        assert_eq!(detector.heard(now), None);
        let (_, verdicts) = run(&mut detector, now, 7);
        assert_eq!(verdicts, []);
    }

    #[test]
    fn our_own_freeze_is_not_the_peers_silence() {
        let start = Instant::now();
        let mut detector = Detector::new(LIMIT, start);
        let (now, _) = run(&mut detector, start, 6);
        let thawed = now + Duration::from_secs(60);
        assert_eq!(detector.tick(thawed), None);
        let (now, verdicts) = run(&mut detector, thawed, 7);
        assert_eq!(verdicts, []);
        let (_, verdicts) = run(&mut detector, now, 1);
        assert_eq!(verdicts.len(), 1, "a peer that stays silent after our thaw is suspected");
    }

    #[test]
    fn a_host_is_awake_from_its_last_late_tick_on() {
        let start = Instant::now();
        let mut detector = Detector::new(LIMIT, start);
        let (now, _) = run(&mut detector, start, 10);
        assert_eq!(detector.awake(now), now - start);
        let thawed = now + Duration::from_secs(60);
        assert_eq!(detector.awake(thawed), Duration::ZERO, "nobody has ticked yet");
        detector.tick(thawed);
        assert_eq!(detector.awake(thawed), Duration::ZERO);
        let (now, _) = run(&mut detector, thawed, 3);
        assert_eq!(detector.awake(now), now - thawed);
    }

    #[test]
    fn silence_while_we_do_not_read_does_not_count() {
        let start = Instant::now();
        let mut detector = Detector::new(LIMIT, start);
        detector.set_reading(false, start);
        let (now, verdicts) = run(&mut detector, start, 100);
        assert_eq!(verdicts, []);
        detector.set_reading(true, now);
        let (_, verdicts) = run(&mut detector, now, 8);
        assert_eq!(verdicts, [Verdict::Suspect { silence: LIMIT }]);
    }

    #[test]
    fn a_missing_ack_is_told_once_per_stall_and_sending_counts_as_progress() {
        let step = LIMIT / 4;
        let mut now = Instant::now();
        let mut watch = AckWatch::new(LIMIT, now);
        watch.ended(Epoch(3), now);
        watch.ended(Epoch(4), now);
        let mut told = Vec::new();
        for tick in 1..=12 {
            now += step;
            if tick == 3 {
                watch.progress(now);
            }
            told.extend(watch.tick(now));
        }
        assert_eq!(told, [AckLate { epoch: Epoch(3), waited: LIMIT }]);
        watch.acked(Epoch(3), now);
        told.clear();
        for _ in 0..4 {
            now += step;
            told.extend(watch.tick(now));
        }
        assert_eq!(told[0].epoch, Epoch(4));
        watch.acked(Epoch(4), now);
        for _ in 0..8 {
            now += step;
            assert_eq!(watch.tick(now), None);
        }
    }

    #[test]
    fn an_ack_is_not_late_because_we_were_frozen() {
        let now = Instant::now();
        let mut watch = AckWatch::new(LIMIT, now);
        watch.ended(Epoch(1), now);
        assert_eq!(watch.tick(now + Duration::from_secs(9)), None);
    }
}
