//! The stream between the two disk services of a mirrored disk.

mod frame;
mod stream;

pub use frame::{Frame, FrameError, Hello, RefuseCode, Welcome};
pub use stream::{Closed, Reader, Writer};
