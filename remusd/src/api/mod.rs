//! The control API: a unix socket that speaks one JSON object a line. docs/api.md describes it for strangers.
//!
//! A connection carries one request. The daemon answers with any number of `event` lines and exactly one `result` or
//! `error` line, which is the last, except for `events` with `follow`, which ends when the client hangs up.

pub mod client;
pub mod server;
pub mod types;

pub use types::{ApiError, ErrorCode, Reply, Request, Role, StatusRow};
