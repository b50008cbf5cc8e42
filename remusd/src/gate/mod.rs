//! The vif gate (rule R9, hazards F3 and F4): which domains' interfaces come up sealed on this host, and who opens them.
//!
//! A small durable list says which domains this host guards: one text file per domain, read by the hotplug script `vif-remus` without
//! the daemon, also at boot before the daemon ([`list`]). The script seals a guarded domain's interfaces before they join a bridge
//! ([`install`] puts it in place) and never lifts a seal. The daemon does, as the owner ([`vifs`]).
//!
//! An entry is there exactly as long as this host might show a copy that it must not: from the moment a protection begins, on both
//! hosts, until this host is the one proven owner (protection has ended here, or the copy was activated here). A host that has lost
//! keeps it, so that whatever its init scripts, its administrator's `xl create` or a reboot of the guest bring up stays sealed; until
//! it owns the guest again, or an operator says `remus gate open`.

pub mod autostart;
pub mod command;
pub mod config;
pub mod install;
pub mod list;
pub mod vifs;

pub use list::{Entry, GateError, GateList};

#[cfg(test)]
mod script_tests;
