//! The primary: the guest runs here and is checkpointed to a backup.
//!
//! `machine` decides (sans-IO), `driver` does what it says, `pump` moves pages to the `peer`, `pace` says when an epoch ends, `report` is what each epoch yields, `trace` keeps the newest of them,
//! `fate` is what becomes of a guest that has ended, `recovery` what a restarted daemon does.

pub mod domain;
pub mod driver;
pub mod fate;
pub mod machine;
pub mod model;
pub mod options;
pub mod ownership;
pub mod pace;
pub mod peer;
pub mod peers;
pub mod pump;
pub mod recovery;
pub mod report;
pub mod scripts;
pub mod trace;
