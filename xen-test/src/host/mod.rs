//! One nested Xen host: a QEMU process and the agent in its dom0.

mod agent;
#[expect(clippy::module_inception, reason = "the host is what the folder is about")]
mod host;
mod qemu;
mod qmp;

pub use agent::{Agent, Input, Output, Running, Said};
pub use host::{Host, pull, push, quote};
pub use qemu::{Machine, MachineOptions, Snapshot};
