//! The client outside both hosts: what a user of the guest sees, with times.
//!
//! Everything here uses plain blocking sockets and threads of its own. A
//! thread inherits the network namespace of the one that starts it, so it is
//! enough to call the constructors on a thread that is in the client's
//! namespace. From async code use a blocking task.
//!
//! Times are [`std::time::Instant`] of the client; `t_ns` is always the
//! guest's own `CLOCK_MONOTONIC`.

mod beacon;
mod control;
mod counter;
mod echo;
mod frame;
mod journal;
mod ledger;
mod packet;
mod probe;
mod sniffer;
mod speakers;
mod spread;

pub use beacon::{BeaconReport, BeaconSink, Received};
pub use control::{Control, ControlError};
pub use counter::{Arrival, CounterClient, CounterReport};
pub use echo::{EchoClient, EchoReport, Exchange};
pub use frame::{Content, Frame, Mac, Said};
pub use ledger::LedgerClient;
pub use packet::PacketError;
pub use probe::{NeighbourProber, Probe, ProbeReport};
pub use sniffer::{Capture, Sniffer};
pub use speakers::{Speakers, Turn};
pub use spread::Spread;
pub use xen_test_guest::protocol;

#[cfg(test)]
mod tests;
