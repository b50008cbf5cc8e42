//! Operations: slow work that is started once, completed exactly once, and whose initiator chooses how it hears of the end (seed 004).
//!
//! ```
//! # use std::sync::Arc;
//! # use remusd::ops::{DomainRef, EventLog, Failure, How, OperationKind, Operations, Outcome};
//! # use remusd::ops::operation::Spec;
//! # async fn example(domain: DomainRef) -> Result<(), Failure> {
//! let operations = Operations::new(Arc::new(EventLog::default()));
//! let (how, waiter) = How::wait();
//! let (initiation, work) = operations.begin(Spec::new(OperationKind::Unprotect, domain), how)?;
//! // Whatever fails from here to `begun` is the initiating call's own error: `initiation` is dropped, nothing else is heard.
//! tokio::spawn(async move {
//!     // ... the slow part ...
//!     work.complete(Outcome::done("the copy is gone"));
//! });
//! initiation.begun();
//! assert!(matches!(waiter.outcome().await, Outcome::Completed(_)));
//! # Ok(())
//! # }
//! ```
//!
//! The rules:
//! - The completion comes once, by the way that was chosen, after [`Initiation::begun`]; that may be before the initiating call has
//!   returned to its caller. Without `begun` it never comes.
//! - It never comes from inside a lock of this module nor on the initiator's stack: a callback runs on a task of its own.
//! - Every operation can be asked to abort. It says at once whether that is still safe, and completes as cancelled, or as what
//!   it became if that was faster.
//! - The daemon's end refuses new operations, aborts those that can be, waits for the others, and after its deadline completes
//!   what is left as failed, so that every initiator has heard.

mod cell;
mod how;
pub mod machine;
mod registry;
mod types;

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;

pub use cell::{Initiation, Work};
pub use how::{How, Waiter};
pub use registry::{AbortAnswer, Operations};
pub use types::{Initiator, Job, JobState, OperationId, OperationKind, OperationNote, Outcome, Progress, Spec};
