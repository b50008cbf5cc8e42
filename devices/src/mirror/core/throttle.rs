//! Back-pressure (R8, hazard F21): how much may be on its way to the backup, and how long a write waits when it is more.
//!
//! Two of these are in a session. In the one *outstanding* are the bytes that were accepted from the guest and not yet
//! applied by the backup, which has to hold them; in the other those that were not sent yet, which this host has to hold.
//! Below `soft` writes are not delayed. From there on they are paced at the rate at which bytes leave (are applied, are
//! sent), so that the guest sees a disk as slow as the way to the backup. At `hard` they wait until something has left; who
//! waits too long ends the session, which is said aloud, and the guest runs on.

/// Milliseconds on a clock that does not go back.
pub type Millis = u64;

/// The slowest pace in bytes per second. Below it a guest could not even suspend in time.
const RATE_MIN: u64 = 256 * 1024;

/// A pace that nobody used is lost after so many microseconds. More than the caller's clock and scheduler are late.
const BURST_US: u64 = 10_000;

/// A rate is taken over at least so long: what a buffer takes at once says nothing about what is behind it.
const WINDOW: Millis = 100;

/// What a write is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on.
    Now,
    /// Go on at this time.
    At(Millis),
    /// Ask again after something has left.
    Full,
}

/// Accounts for what is on its way.
#[derive(Debug, Clone)]
pub struct Throttle {
    soft: u64,
    hard: u64,
    outstanding: u64,
    /// Bytes per second that leave when there are enough, smoothed.
    rate: u64,
    /// Since when bytes that leave are counted, and how many did.
    window: Option<(Millis, u64)>,
    /// Up to when, in microseconds, what was let in uses up the pace.
    paced: u64,
    /// From when on, in microseconds, the write that asks uses up the pace. It asks again, and must not begin anew then.
    asking: Option<u64>,
    /// When something left last.
    drained: Option<Millis>,
}

impl Throttle {
    /// Limits in bytes. `soft` is at most `hard`.
    #[must_use]
    pub fn new(soft: u64, hard: u64) -> Self {
        let hard = hard.max(1);
        Self {
            soft: soft.min(hard),
            hard,
            outstanding: 0,
            rate: RATE_MIN * 16,
            window: None,
            paced: 0,
            asking: None,
            drained: None,
        }
    }

    /// A write of `length` bytes asks to go on. It is counted if the answer is `Now`. Ask for one at a time, in order.
    pub fn admit(&mut self, now: Millis, length: u64) -> Admission {
        let answer = self.ask(now, length);
        if answer == Admission::Now {
            self.take(now, length);
        }
        answer
    }

    /// The same without counting.
    pub fn ask(&mut self, now: Millis, length: u64) -> Admission {
        if !self.is_pressed() {
            return Admission::Now;
        }
        if self.outstanding + length > self.hard {
            return Admission::Full;
        }
        let at = self.pace(now, length);
        if at > now * 1000 { Admission::At(at / 1000 + 1) } else { Admission::Now }
    }

    /// Counts what [`Throttle::ask`] has let in.
    pub fn take(&mut self, now: Millis, length: u64) {
        self.paced = if self.is_pressed() { self.pace(now, length) } else { now * 1000 };
        self.asking = None;
        self.outstanding += length;
    }

    fn pace(&mut self, now: Millis, length: u64) -> u64 {
        let start = *self.asking.get_or_insert(self.paced.max((now * 1000).saturating_sub(BURST_US)));
        start + length * 1_000_000 / self.rate.max(RATE_MIN)
    }

    /// Counts without asking: what cannot wait, or was counted by somebody else before.
    pub fn add(&mut self, length: u64) {
        self.outstanding += length;
    }

    /// Bytes that will not be sent after all.
    pub fn forget(&mut self, length: u64) {
        self.outstanding = self.outstanding.saturating_sub(length);
    }

    /// `length` bytes have left.
    pub fn drained(&mut self, now: Millis, length: u64) {
        if length == 0 {
            return;
        }
        // Who waits for us says nothing about how fast he is.
        self.window = match self.window.filter(|_| self.is_pressed()) {
            None => Some((now, 0)),
            Some((since, bytes)) if now < since + WINDOW => Some((since, bytes + length)),
            Some((since, bytes)) => {
                self.rate = (self.rate * 3 + (bytes + length) * 1000 / (now - since)) / 4;
                Some((now, 0))
            }
        };
        self.drained = Some(now);
        self.outstanding = self.outstanding.saturating_sub(length);
    }

    /// When something has left last.
    #[must_use]
    pub fn drained_at(&self) -> Millis {
        self.drained.unwrap_or(0)
    }

    /// Whether synchronisation should pause in favour of the guest.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        self.outstanding >= self.soft
    }

    /// Bytes accepted that have not left.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Bytes per second that leave, as last seen.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// How much a guest gets through in a minute, and the most that is outstanding, when `rate` bytes leave every second.
    fn minute(rate: u64, write: u64) -> (u64, u64) {
        let mut throttle = Throttle::new(4 << 20, 64 << 20);
        let (mut accepted, mut peak) = (0, 0);
        for now in (0..60_000).step_by(10) {
            while throttle.admit(now, write) == Admission::Now {
                accepted += write;
            }
            peak = peak.max(throttle.outstanding());
            throttle.drained(now, throttle.outstanding().min(rate / 100));
        }
        (accepted, peak)
    }

    #[test]
    fn a_fast_guest_on_a_slow_link_is_paced_to_the_link() {
        for (rate, write) in [(1_250_000, 65536), (1_250_000, 32 << 20), (100_000_000, 4096), (300_000, 1 << 20)] {
            let (accepted, peak) = minute(rate, write);
            assert!(accepted > 50 * rate, "the link is used: {accepted} of {rate} a second in writes of {write}");
            assert!(peak <= (32 << 20) + write, "{peak} at {rate} in writes of {write}");
        }
    }

    #[test]
    fn writes_are_paced_also_while_nothing_leaves() {
        let mut throttle = Throttle::new(1 << 20, 32 << 20);
        let mut accepted = 0;
        for now in (0..2000).step_by(3) {
            while throttle.admit(now, 256 << 10) == Admission::Now {
                accepted += 256 << 10;
            }
        }
        assert!((7 << 20..=10 << 20).contains(&accepted), "two seconds at 4 MiB/s: {accepted}");
    }

    proptest! {
        #[test]
        fn what_is_outstanding_never_passes_the_hard_limit_by_more_than_one_write(
            steps in prop::collection::vec((1u64..200_000, any::<bool>(), 0u64..500), 1..200),
        ) {
            let mut throttle = Throttle::new(300_000, 1_000_000);
            let mut now = 0;
            for (bytes, write, wait) in steps {
                now += wait;
                if write {
                    throttle.admit(now, bytes);
                } else {
                    throttle.drained(now, bytes);
                }
                prop_assert!(throttle.outstanding() <= 1_000_000 + 200_000);
            }
        }
    }
}
