//! A mirrored disk: epoch-buffered replication on a stock kernel. `docs/disks.md` describes it.
//!
//! - [`core`]: the rules, without input and output.
//! - [`io`], [`nbd`], [`peer`]: the disk below, the guest's side, the other host's side.
//! - [`service`]: the process that puts them together, one per disk.
//! - [`Mirror`], [`Standby`], [`client`]: the device layer's and the daemon's view of it, on the primary and on the backup.

pub mod client;
pub mod core;
pub mod io;
pub mod nbd;
pub mod peer;
pub mod service;
pub mod standby;
mod subkind;

pub use standby::{Standby, StandbyError};
pub use subkind::{DiskNews, Mirror, MirrorConfig, end_protection};
