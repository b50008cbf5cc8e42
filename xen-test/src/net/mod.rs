//! The world the hosts live in: a network namespace with a data bridge (hosts, guests, client) and
//! a management bridge that no fault ever touches.

mod links;
mod netns;

pub use links::{Links, Party};
pub use netns::{NetNs, enter_netns_of};

/// Address of the harness on the management network.
pub const MANAGEMENT_HARNESS: &str = "10.78.0.254";
/// Address of the client process on the data network.
pub const CLIENT_ADDRESS: &str = "10.77.0.100";
/// The client's IPv6 address on the data network.
pub const CLIENT_ADDRESS6: &str = "fd77::100";
