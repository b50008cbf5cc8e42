//! The disk below the mirror, the file that its metadata is in, and a guest's device-mapper device above it.

mod backing;
mod buffer;
mod mapper;
mod meta_file;

pub use backing::{Backing, BackingError};
pub use buffer::Buffer;
pub use mapper::{Mapped, MapperError, name_below, remove_below};
pub use meta_file::{Loaded, MetaFile, MetaFileError};
