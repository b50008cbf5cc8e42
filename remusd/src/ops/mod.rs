//! What happens, told to people and programs: events (seed 002) and the backoff loop (seed 000).

pub mod backoff;
pub mod event;

pub use backoff::Backoff;
pub use event::{DomainRef, Event, EventKind, EventLog};
