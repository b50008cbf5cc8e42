//! Quantiles of durations.

use std::time::Duration;

use serde::Serialize;

/// How a set of durations spreads, in milliseconds; zeroes for an empty set.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// The shortest.
    pub min_ms: f64,
    /// The median.
    pub p50_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Spread {
    /// Sorts and picks.
    pub fn of(durations: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = durations.into_iter().map(|d| d.as_secs_f64() * 1000.0).collect();
        ms.sort_by(f64::total_cmp);
        let Some((&min_ms, &max_ms)) = ms.first().zip(ms.last()) else { return Self::default() };
        let at = |q: f64| ms[((ms.len() as f64 * q).ceil() as usize).clamp(1, ms.len()) - 1];
        Self { count: ms.len(), min_ms, p50_ms: at(0.5), p99_ms: at(0.99), max_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let s = Spread::of((1..=200).rev().map(Duration::from_millis));
        assert_eq!((s.count, s.min_ms, s.p50_ms, s.p99_ms, s.max_ms), (200, 1.0, 100.0, 198.0, 200.0));
        assert_eq!(Spread::of([]), Spread::default());
    }
}
