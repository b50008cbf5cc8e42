//! The disk below the mirror, and the file that its metadata is in.

mod backing;
mod buffer;
mod meta_file;

pub use backing::{Backing, BackingError};
pub use buffer::Buffer;
pub use meta_file::{Loaded, MetaFile, MetaFileError};
