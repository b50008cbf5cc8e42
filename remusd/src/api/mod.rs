//! The control API: varlink on a unix socket. `org.remus.Control.varlink` is the interface, docs/api.md explains it to strangers.

pub mod access;
pub mod client;
pub mod server;
pub mod types;
pub mod wire;

pub use types::{ApiError, Caller, ErrorCode, MayRun, Reply, Request, Role, StatusRow, TargetSpec, Trace};

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod example;
