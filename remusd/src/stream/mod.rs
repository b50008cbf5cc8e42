//! The migration streams of Xen: what the save helper writes and what `xl migrate-receive` reads.
//!
//! Sans-IO: parsers take bytes, writers return bytes. Formats: Xen's `docs/specs/libxl-migration-stream.pandoc`
//! and `docs/specs/libxc-migration-stream.pandoc`, as implemented by Xen 4.17.

pub mod compose;
pub mod digest;
pub mod error;
pub mod handshake;
pub mod item;
pub mod libxc;
pub mod libxl;
pub mod pull;
pub mod save_file;
pub mod session;

pub use compose::{PlainComposer, RemusComposer};
pub use error::StreamError;
pub use item::{CaptureItem, Layer, PAGE_SIZE, PageBatch, Record};
pub use pull::{Chunked, Pull};
pub use session::{SessionEvent, SessionParser};

#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod tests;
