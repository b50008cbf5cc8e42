//! What loads or measures the guest: memory dirtier, stall meter, busy work.

pub mod dirty;
mod pattern;
pub mod stall;
pub mod work;
