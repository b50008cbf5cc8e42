//! The primary: the guest runs here and is checkpointed to a backup.
//!
//! `machine` decides (sans-IO), `driver` does what it says, `report` is what each epoch yields.

pub mod domain;
pub mod machine;
pub mod options;
pub mod report;
