//! A guest's memory as dom0 sees it: mapped once and kept mapped, its dirty pages logged.
//!
//! A mapping shows the frame that a page had when it was mapped, and holds on to that frame: a page that the guest gives back by
//! ballooning stays counted as the domain's until it is unmapped, so a page that comes in its place makes the domain's page count
//! grow. [`GuestSource::stale`](source::GuestSource) looks at that count before each copy, and everything is mapped anew when it has
//! changed (hazard F18). A domain that is destroyed stays a zombie until its memory is unmapped: drop the source when it ends.

pub mod windows;

#[cfg(feature = "xen")]
mod calls;
#[cfg(feature = "xen")]
mod source;

pub use windows::Windows;

#[cfg(feature = "xen")]
pub use source::GuestSource;
