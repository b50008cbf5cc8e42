//! The backup: takes epochs in, verifies and acknowledges them, feeds the stock receiver, activates the copy when it may.
//!
//! `admission` decides about an offer and `machine` about the protection (both sans-IO), `staging` holds the epoch in progress, `receiver` is `xl migrate-receive` and `feed` its pipe,
//! `host` is what the backup asks of this host, `incoming` drives one protection and `registry` all of them.
//! docs/protocol.md has the state table.

pub mod admission;
mod copy;
mod drill;
mod driver;
pub mod error;
pub mod feed;
pub mod from_stock;
pub mod host;
pub mod incoming;
pub mod machine;
pub mod receiver;
pub mod record;
pub mod registry;
pub mod staging;

pub use drill::{DrillError, DrillReport};
pub use error::{BackupError, CommandError};
pub use host::{BackupHost, IncomingDomain};
pub use incoming::{ActivationReport, IncomingHandle, IncomingStatus};
pub use record::{IncomingRecord, RecordStore};
pub use registry::{BackupSettings, Registry};
