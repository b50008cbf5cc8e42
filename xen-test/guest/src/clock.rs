//! The guest's clocks.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds.
///
/// A Xen suspend stops it; after a restore it goes on from its old value.
pub fn monotonic_ns() -> u64 {
    ns(ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_MONOTONIC_RAW` in nanoseconds: unslewed, for calibration.
pub(crate) fn raw_ns() -> u64 {
    ns(ClockId::CLOCK_MONOTONIC_RAW)
}

fn ns(id: ClockId) -> u64 {
    // The two clocks used here exist on every Linux, so this cannot fail.
    let t = clock_gettime(id).expect("monotonic clocks exist on every Linux");
    u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0)
}
