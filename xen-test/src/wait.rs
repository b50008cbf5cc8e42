//! Waiting for something outside that has no event.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The time within which `wait_until` gave nothing is over.
#[derive(Debug, thiserror::Error)]
#[error("{what}: not within {} s", .waited.as_secs_f32())]
pub struct Timeout {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub waited: Duration,
}

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Asks `probe` again and again, at growing intervals (10 ms to 0.5 s), until it gives a value.
///
/// # Errors
/// An error of `probe` ends the wait at once. After `limit` the error is [`Timeout`], naming `what`.
pub fn wait_until<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some(value) = probe().with_context(|| format!("waiting: {what}"))? {
            return Ok(value);
        }
        let waited = start.elapsed();
        if waited >= limit {
            return Err(Timeout { what: what.to_owned(), waited }.into());
        }
        std::thread::sleep(pause.min(limit - waited));
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value_or_names_what_was_missing() {
        let mut count = 0;
        let value = wait_until(Duration::from_secs(5), "third time", || {
            count += 1;
            Ok((count == 3).then_some(count))
        });
        assert_eq!(value.unwrap(), 3);
        let error = wait_until(Duration::from_millis(30), "the moon", || Ok(None::<()>));
        assert!(error.unwrap_err().to_string().starts_with("the moon: not within"));
        let error = wait_until(Duration::from_secs(5), "x", || -> Result<Option<()>> { anyhow::bail!("broken probe") });
        assert!(format!("{:#}", error.unwrap_err()).contains("broken probe"));
    }
}
