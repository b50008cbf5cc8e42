//! Nested Xen test harness.
fn main() {}
