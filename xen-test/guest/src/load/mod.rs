//! What loads or measures the guest: memory dirtier, disk writer, stall meter, busy work.

pub mod dirty;
pub mod disk;
mod pattern;
pub mod stall;
pub mod work;
