//! The lines that enforce the safety rules, by name, so that the simulator can take one away and see whether it notices.
//!
//! A line is enforced as `enforced("name") && condition` where `condition` protects. In every build but those with the feature
//! `mutants`, which nothing but the simulator's mutation check is built with, it is the constant `true`.

#[cfg(feature = "mutants")]
thread_local! {
    static WITHOUT: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Whether this line counts: always, but for the one that is taken away on this thread.
#[cfg(feature = "mutants")]
#[must_use]
pub fn enforced(line: &'static str) -> bool {
    WITHOUT.get() != Some(line)
}

/// Always.
#[cfg(not(feature = "mutants"))]
#[must_use]
#[inline(always)]
pub const fn enforced(_: &'static str) -> bool {
    true
}

/// Takes this line away on this thread, or none.
#[cfg(feature = "mutants")]
pub fn take_away(line: Option<&'static str>) {
    WITHOUT.set(line);
}
