//! Xen as remusd sees it: the hypervisor, xenstore, and the suspend protocol that needs both. The only unsafe code.
//!
//! The traits [`Hypervisor`] and [`XenStore`] and their in-memory doubles build everywhere; the real ones need the
//! feature `xen`.

pub mod domain;
pub mod fake;
pub mod guard;
pub mod hypervisor;
pub mod pages;
pub mod spawn;
pub mod store;
pub mod suspend;

#[cfg(feature = "xen")]
pub mod create;
#[cfg(feature = "xen")]
mod ffi;
pub mod foreign;
#[cfg(feature = "xen")]
mod owner;
#[cfg(feature = "xen")]
mod real;
#[cfg(feature = "xen")]
mod rescue;
#[cfg(feature = "xen")]
pub mod soname;

pub use domain::{DomainInfo, DomainState, GuestType, HostInfo, ShutdownReason, XenVersion};
pub use fake::{FakeHypervisor, FakeStore};
pub use guard::{GuardHandle, SuspendGuard};
pub use hypervisor::{HvmParam, Hypervisor, LogDirty, XenError};
pub use pages::{FakePages, GuestPages, PageHash};
pub use store::{Compared, StoreError, Watch, XenStore};
pub use suspend::{SuspendError, Suspended, Suspender};

#[cfg(feature = "xen")]
pub use pages::XenPages;
#[cfg(feature = "xen")]
pub use real::XenHypervisor;
#[cfg(feature = "xen")]
pub use store::real::RealStore;

#[cfg(test)]
mod suspend_tests;
