//! The one loop for waiting on something that has no event (seed 000).
//!
//! ```
//! # use remusd::ops::Backoff;
//! # use std::time::Duration;
//! # async fn ask_peer() -> Option<String> { None }
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1), Duration::from_secs(30))?;
//! // Asks at once, then after 10 ms, 20 ms, 40 ms ... 1 s, 1 s, and for the last time 30 s after the beginning.
//! let answer = backoff.until(ask_peer).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Where the tries differ or errors end them early, the same by hand: `loop { try, break if done; backoff.wait().await?; }`.

use std::time::Duration;

use tokio::time::Instant;

/// Waits that double from `first` up to `cap`, until `total` has passed since construction.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    next: Duration,
    cap: Duration,
    deadline: Option<Instant>,
    jitter: f64,
    random: u64,
}

/// The settings of a [`Backoff`] make no sense.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum InvalidBackoff {
    /// The times are not in order.
    #[error("Invalid backoff: first wait {first:?}, cap {cap:?}, total {total:?}; want 0 < first <= cap <= total")]
    Times {
        /// First wait.
        first: Duration,
        /// Longest wait.
        cap: Duration,
        /// All waits together.
        total: Duration,
    },
    /// The jitter is no fraction.
    #[error("Invalid backoff: jitter {0}; want 0 <= jitter < 1")]
    Jitter(f64),
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
        let backoff = Self::endless(first, cap).map_err(|_| InvalidBackoff::Times { first, cap, total })?;
        if cap > total {
            return Err(InvalidBackoff::Times { first, cap, total });
        }
        Ok(Self { deadline: Some(Instant::now() + total), ..backoff })
    }

    /// Without an end: [`Self::wait`] never fails.
    ///
    /// # Errors
    /// [`InvalidBackoff`] unless `0 < first <= cap`.
    pub fn endless(first: Duration, cap: Duration) -> Result<Self, InvalidBackoff> {
        if first.is_zero() || first > cap {
            return Err(InvalidBackoff::Times { first, cap, total: Duration::MAX });
        }
        // Seeds need not be good, only different between those that may collide.
        let random = uuid::Uuid::new_v4().as_u64_pair().0 | 1;
        Ok(Self { first, next: first, cap, deadline: None, jitter: 0.0, random })
    }

    /// Shortens each wait by a random part of up to `jitter` of it, where many may begin to wait at the same time.
    ///
    /// # Errors
    /// [`InvalidBackoff`] unless `0 <= jitter < 1`.
    pub fn jitter(self, jitter: f64) -> Result<Self, InvalidBackoff> {
        if !(0.0..1.0).contains(&jitter) {
            return Err(InvalidBackoff::Jitter(jitter));
        }
        Ok(Self { jitter, ..self })
    }

    /// Begins anew with the first wait; the total time goes on. For when a try got further than before.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Sleeps for the next wait, cut short at the deadline, so that the condition is tried once more there.
    ///
    /// # Errors
    /// [`Expired`] at once when the deadline had passed before the call.
    pub async fn wait(&mut self) -> Result<(), Expired> {
        let left = match self.deadline {
            Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                None | Some(Duration::ZERO) => return Err(Expired),
                Some(left) => left,
            },
            None => Duration::MAX,
        };
        let wait = self.next.mul_f64(1.0 - self.jitter * self.fraction()).min(left);
        self.next = (self.next * 2).min(self.cap);
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Tries at once and after each wait, until there is an answer.
    ///
    /// # Errors
    /// [`Expired`] when the last try, at the deadline, had none either.
    pub async fn until<T, F: Future<Output = Option<T>>>(&mut self, mut ask: impl FnMut() -> F) -> Result<T, Expired> {
        loop {
            if let Some(answer) = ask().await {
                return Ok(answer);
            }
            self.wait().await?;
        }
    }

    /// 0 to 1, by xorshift64 (Marsaglia 2003).
    fn fraction(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
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
        for jitter in [-0.1, 1.0, f64::NAN] {
            assert!(Backoff::endless(MS, MS).unwrap().jitter(jitter).is_err(), "{jitter}");
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

    #[tokio::test(start_paused = true)]
    async fn tries_first_and_once_more_at_the_deadline() {
        let start = Instant::now();
        let mut tries = Vec::new();
        let result = Backoff::new(MS, MS * 4, MS * 10)
            .unwrap()
            .until(|| {
                tries.push(start.elapsed().as_millis());
                std::future::ready(None::<()>)
            })
            .await;
        assert_eq!((result, tries), (Err(Expired), vec![0, 1, 3, 7, 10]));
        assert_eq!(Backoff::new(MS, MS, MS).unwrap().until(|| std::future::ready(Some(5))).await, Ok(5));
    }

    #[tokio::test(start_paused = true)]
    async fn jitter_shortens_by_up_to_its_part_and_differs() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..20 {
            let start = Instant::now();
            let mut backoff = Backoff::endless(MS * 1000, MS * 1000).unwrap().jitter(0.5).unwrap();
            backoff.wait().await.unwrap();
            let waited = start.elapsed();
            assert!(waited >= MS * 500 && waited <= MS * 1001, "{waited:?}");
            seen.insert(waited.as_millis());
        }
        assert!(seen.len() > 10, "{seen:?}");
    }
}
