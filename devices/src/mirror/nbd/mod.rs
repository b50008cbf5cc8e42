//! The network block device protocol, server side, and the kernel's client for it.
//!
//! Fixed newstyle negotiation and simple replies, as in the protocol's specification
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).

pub mod kernel;
pub mod proto;
pub mod server;
