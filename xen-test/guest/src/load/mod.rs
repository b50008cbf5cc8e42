//! What loads or measures the guest: memory dirtier, disk writer, ledger on a file system, stall meter, busy work.

pub mod dirty;
pub mod disk;
pub mod ledger;
mod pattern;
pub mod stall;
pub mod work;
