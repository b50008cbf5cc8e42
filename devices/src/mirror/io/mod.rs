//! The disk below the mirror, the files that its metadata and its journal are in, and a guest's device-mapper device above it.

mod backing;
mod buffer;
mod journal;
mod lock;
mod mapper;
mod meta_file;

pub use backing::{Backing, BackingError};
pub use buffer::{Buffer, COMPACT};
pub use journal::{Journal, JournalError};
pub use mapper::{Mapped, MapperError, name_below, remove_below};
pub use meta_file::{Loaded, MetaFile, MetaFileError};
