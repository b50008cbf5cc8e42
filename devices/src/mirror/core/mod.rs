//! The mirror's rules, without input and output.

pub mod extent;
pub mod intent;
pub mod marks;
pub mod meta;
#[cfg(test)]
mod model_tests;
pub mod range_locks;
pub mod record;
pub mod resync;
pub mod source;
pub mod spill;
pub mod target;
pub mod throttle;
