//! The migration streams of Xen: what the save helper writes and what `xl migrate-receive` reads.
//!
//! Sans-IO: parsers take bytes, writers return bytes. Formats: Xen's `docs/specs/libxl-migration-stream.pandoc`
//! and `docs/specs/libxc-migration-stream.pandoc`, as implemented by Xen 4.17.

pub mod digest;
pub mod item;

pub use item::{CaptureItem, Layer, PAGE_SIZE, PageBatch, Record};
