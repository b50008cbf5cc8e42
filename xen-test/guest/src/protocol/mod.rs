//! What guest and client say to each other. Everything is lines of ASCII, so
//! that a sniffer recognises it in a captured frame.

mod control;
mod lines;

pub use control::{
    BadPage, BeaconInfo, BeaconSpec, Command, DirtyInfo, DirtySpec, DiskInfo, DiskSpec, Hello, LedgerInfo, Mem, Order,
    Reply, Stall, StallReport, Verdict, WorkInfo,
};
pub use lines::{CounterLine, Datagram, MAX_PAYLOAD, Rate};

use std::net::{Ipv4Addr, Ipv6Addr};

/// A line or datagram that is not what the protocol says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, got {got:?}")]
pub struct BadLine {
    /// The form that was expected.
    pub expected: &'static str,
    /// What came instead, cut to 80 bytes.
    pub got: String,
}

impl BadLine {
    pub(crate) fn new(expected: &'static str, got: &str) -> Self {
        Self { expected, got: got.chars().take(80).collect() }
    }
}

/// TCP and UDP ports of the guest's services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// TCP: counter lines.
    pub counter: u16,
    /// TCP: echo.
    pub echo_tcp: u16,
    /// UDP: echo.
    pub echo_udp: u16,
    /// TCP: control.
    pub control: u16,
    /// TCP: entries of the ledger.
    pub ledger: u16,
}

impl Default for Ports {
    /// The ports of a real guest.
    fn default() -> Self {
        Self { counter: 7000, echo_tcp: 7001, echo_udp: 7002, control: 7003, ledger: 7004 }
    }
}

impl Ports {
    /// Ask the kernel for free ports: for tests.
    pub const ANY: Self = Self { counter: 0, echo_tcp: 0, echo_udp: 0, control: 0, ledger: 0 };
}

/// The IPv6 address a guest takes when its command line gives none: the IPv4
/// address in the low 32 bits of the test network's fd77::/64.
pub fn default_ip6(ip: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = ip.octets();
    let low = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, low[0], low[1])
}
