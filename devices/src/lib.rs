//! What a checkpoint does to a guest's devices.
//!
//! A device *kind* (nic, disk) has an ordered list of *subkinds*, ways of handling such a device. For each
//! device of a domain the first subkind that matches takes it; [`DeviceSet`] drives all of them through the
//! life of a protection: set up, arm, one round of phases per epoch, tear down. `docs/devices.md` describes
//! the layer and says how to add a subkind.
//!
//! - [`netbuffer`]: holds what a guest sends until the epoch it was sent in is acknowledged.
//! - [`mirror`]: a disk whose writes are shipped by epoch, on a stock kernel.
//! - [`drbd`]: recognises disks on DRBD, to refuse them.
//! - [`script`]: a disk in the care of somebody else's program.
//! - [`Copies`]: the disks of a copy, as the backup drives them.
//! - [`NoOp`]: takes what policy names and does nothing.
//! - [`output_signal`]: the word that output is held, for who decides when an epoch ends.
//! - [`classify`]: from xenstore entries to devices, and the kinds to refuse.

mod classify;
mod copies;
mod device;
pub mod drbd;
mod error;
pub mod mirror;
pub mod netbuffer;
mod none;
mod output;
mod policy;
pub mod script;
mod set;
mod subkind;

pub use classify::{Classified, Node, Refused, Uncovered, classify};
pub use copies::{Copies, CopiesError};
pub use device::{Device, DeviceStats, Ending, EpochContext, Kind};
pub use error::{BoxError, DeviceError, SetError};
pub use none::NoOp;
pub use output::{OutputTeller, OutputWatch, output_signal};
pub use policy::{Allow, Policy};
pub use set::{DeviceSet, Passed, Record};
pub use subkind::{Checkpointed, Match, Subkind};
