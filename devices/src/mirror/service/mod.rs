//! The disk service: one small process per disk, which outlives remusd (hazard F20).
//!
//! Threads and blocking I/O: a write of the guest is one thread's work from the socket to the disk and back.

mod above;
mod control;
mod dial;
mod engine;
mod events;
mod follower;
mod node;
mod pool;
mod runtime;
mod spill;

pub use control::{Request, Response, Status, TargetStatus, call, serve_control};
pub use events::DiskEvent;
pub use follower::bridge;
pub use node::{JournalConfig, Node, NodeConfig, NodeError};
