//! Back-pressure (R8, hazard F21): how much may be on its way to the backup, and how long a write waits when it is more.
//!
//! *Outstanding* are the bytes that were accepted from the guest and not yet applied by the backup. Up to `soft` writes
//! are not delayed. Above, they are paced at the rate at which the backup applies, so that the guest sees a disk as slow
//! as the way to the backup. At `hard` they wait until something was applied; who waits too long ends the session, which
//! is said aloud, and the guest runs on.

/// Milliseconds on a clock that does not go back.
pub type Millis = u64;

/// The slowest pace in bytes per second. Below it a guest could not even suspend in time.
const RATE_MIN: u64 = 256 * 1024;

/// What a write is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on.
    Now,
    /// Go on at this time.
    At(Millis),
    /// Ask again after something was applied.
    Full,
}

/// Accounts for what is on its way.
#[derive(Debug, Clone)]
pub struct Throttle {
    soft: u64,
    hard: u64,
    outstanding: u64,
    /// Bytes per second that the backup applies, smoothed.
    rate: u64,
    /// When the last paced write goes on.
    next: Millis,
    drained_at: Option<Millis>,
}

impl Throttle {
    /// Limits in bytes. `soft` is at most `hard`.
    #[must_use]
    pub fn new(soft: u64, hard: u64) -> Self {
        let hard = hard.max(1);
        Self { soft: soft.min(hard), hard, outstanding: 0, rate: RATE_MIN * 4, next: 0, drained_at: None }
    }

    /// A write of `length` bytes asks to go on. Unless the answer is `Full` it is counted from now on.
    pub fn admit(&mut self, now: Millis, length: u64) -> Admission {
        // One write is always let in: it could otherwise never be, if it alone is over the limit.
        if self.outstanding > 0 && self.outstanding + length > self.hard {
            return Admission::Full;
        }
        self.outstanding += length;
        if self.outstanding <= self.soft {
            return Admission::Now;
        }
        let start = self.next.max(now);
        self.next = start + length * 1000 / self.rate.max(RATE_MIN);
        if self.next <= now { Admission::Now } else { Admission::At(self.next) }
    }

    /// Counts without asking: what cannot wait, or was counted by somebody else before.
    pub fn add(&mut self, length: u64) {
        self.outstanding += length;
    }

    /// Bytes that will not be sent after all.
    pub fn forget(&mut self, length: u64) {
        self.outstanding = self.outstanding.saturating_sub(length);
    }

    /// The backup has applied `length` bytes.
    pub fn drained(&mut self, now: Millis, length: u64) {
        self.outstanding = self.outstanding.saturating_sub(length);
        if let Some(before) = self.drained_at {
            let took = now.saturating_sub(before).max(1);
            self.rate = (self.rate * 3 + length * 1000 / took) / 4;
        }
        self.drained_at = Some(now);
        if self.outstanding <= self.soft {
            self.next = now;
        }
    }

    /// Whether synchronisation should pause in favour of the guest.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        self.outstanding >= self.soft
    }

    /// Bytes accepted and not applied.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Bytes per second that the backup applies, as last seen.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_fast_guest_on_a_slow_link_is_paced_to_the_link() {
        // 1.25 MB/s leave, in steps of 100 ms; the guest always has 32 writes of 64 KiB under way.
        let mut throttle = Throttle::new(4 << 20, 64 << 20);
        let (mut now, mut accepted, mut waiting) = (0u64, 0u64, Vec::new());
        let mut peak = 0;
        while now < 60_000 {
            waiting.retain(|at| *at > now);
            while waiting.len() < 32 {
                match throttle.admit(now, 65536) {
                    Admission::Now => accepted += 65536,
                    Admission::At(at) => {
                        accepted += 65536;
                        waiting.push(at);
                    }
                    Admission::Full => panic!("pacing alone keeps this guest below the hard limit"),
                }
            }
            now += 100;
            peak = peak.max(throttle.outstanding());
            throttle.drained(now, throttle.outstanding().min(125_000));
        }
        assert!(peak < 16 << 20, "{peak}");
        assert!(accepted > 60 * 1_000_000, "the link is used: {accepted}");
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
                prop_assert!(throttle.outstanding() <= 1_000_000);
            }
        }
    }
}
