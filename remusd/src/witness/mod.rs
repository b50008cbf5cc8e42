//! The witness (R3): one record per protection at a place that neither host is, changed only by compare-and-swap, says who may run
//! the guest. docs/witness.md has the rules in words.

pub mod client;
pub mod config;
pub mod etcd;
pub mod keeper;
pub mod memory;
pub mod probe;
pub mod record;
pub mod rules;
pub mod script;
pub mod store;

pub use client::{Busy, CasReply, Client, Dropped, Effect, Input, Outcome, ReadError, RequestId};
pub use config::{ConfigError, WitnessConfig};
pub use keeper::{Answer, Keeper, KeeperEvent, Watched};
pub use probe::{Health, Probe};
pub use record::{Attempt, Host, HostId, Position, Record, RecordKey, RecordState, Versioned, Watermark};
pub use rules::{Intent, Refusal};
pub use store::WitnessStore;

#[cfg(test)]
mod client_tests;
#[cfg(test)]
mod etcd_tests;
#[cfg(test)]
mod example_tests;
#[cfg(test)]
mod keeper_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod rules_tests;
#[cfg(test)]
mod script_tests;
#[cfg(test)]
mod test_proxy;
