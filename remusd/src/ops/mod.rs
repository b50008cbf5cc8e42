//! Slow work and what is told of it: operations (seed 004, abort: seed 001), events (seed 002), the backoff loop (seed 000).

pub mod backoff;
pub mod event;
pub mod failure;
pub mod operation;

pub use backoff::Backoff;
pub use event::{Delivery, DomainRef, Event, EventKind, EventLog, Filter, Subscription};
pub use failure::{ErrorCode, Failure};
pub use operation::{How, OperationId, OperationKind, Operations, Outcome, Work};
