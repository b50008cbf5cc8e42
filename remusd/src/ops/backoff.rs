//! The one loop for waiting on something that has no event (seed 000).
//!
//! ```
//! # use remusd::ops::Backoff;
//! # use std::time::Duration;
//! # async fn peer_is_up() -> bool { true }
//! # async fn example() -> bool {
//! let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1), Duration::from_secs(30)).unwrap();
//! loop {
//!     if peer_is_up().await {
//!         break true;
//!     }
//!     if backoff.wait().await.is_err() {
//!         break false;
//!     }
//! }
//! # }
//! ```

use std::time::Duration;

use tokio::time::Instant;

/// Waits that double from `first` up to `cap`, until `total` has passed since construction.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    cap: Duration,
    deadline: Instant,
}

/// The settings of a [`Backoff`] make no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Invalid backoff: first wait {first:?}, cap {cap:?}, total {total:?}; want 0 < first <= cap <= total")]
pub struct InvalidBackoff {
    first: Duration,
    cap: Duration,
    total: Duration,
}

/// The total time of a [`Backoff`] is used up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Gave up waiting")]
pub struct Expired;

impl Backoff {
    /// Starts the clock.
    ///
    /// # Errors
    /// [`InvalidBackoff`] unless `0 < first <= cap <= total`.
    pub fn new(first: Duration, cap: Duration, total: Duration) -> Result<Self, InvalidBackoff> {
        if first.is_zero() || first > cap || cap > total {
            return Err(InvalidBackoff { first, cap, total });
        }
        Ok(Self { next: first, cap, deadline: Instant::now() + total })
    }

    /// Sleeps for the next wait, cut short at the deadline, so that the condition is tried once more there.
    ///
    /// # Errors
    /// [`Expired`] at once when the deadline had passed before the call.
    pub async fn wait(&mut self) -> Result<(), Expired> {
        let now = Instant::now();
        if now >= self.deadline {
            return Err(Expired);
        }
        let wait = self.next.min(self.deadline - now);
        self.next = (self.next * 2).min(self.cap);
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn refuses_senseless_settings() {
        for (first, cap, total) in [(0, 1, 2), (2, 1, 3), (1, 3, 2)] {
            assert!(Backoff::new(MS * first, MS * cap, MS * total).is_err(), "{first} {cap} {total}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn doubles_up_to_the_cap_and_ends_at_the_total() {
        let start = Instant::now();
        let mut backoff = Backoff::new(MS, MS * 4, MS * 10).unwrap();
        let mut at = Vec::new();
        while backoff.wait().await.is_ok() {
            at.push(start.elapsed().as_millis());
        }
        assert_eq!(at, [1, 3, 7, 10]);
    }
}
