//! xenstore, the shared tree of strings through which toolstack, guests and backends talk.
//!
//! Nothing here assumes oxenstored or C xenstored; both are in use on Debian.

#[cfg(feature = "xen")]
pub(in crate::xen) mod native;
#[cfg(feature = "xen")]
mod pump;
#[cfg(feature = "xen")]
pub(in crate::xen) mod real;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::ids::DomId;

/// A failed xenstore request.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No connection to xenstored.
    #[error(
        "cannot connect to xenstored: {cause}; is it running (systemctl status xenstored, or /etc/init.d/xen status)?"
    )]
    Connect {
        /// What the system said.
        cause: String,
    },
    /// The connection to xenstored has ended.
    #[error("the connection to xenstored has ended; xenstored has died or was replaced, restart remusd")]
    Gone,
    /// A request failed.
    #[error("xenstore {request} {path}: {cause}")]
    Request {
        /// What was asked.
        request: &'static str,
        /// About which node.
        path: String,
        /// What xenstored said.
        cause: String,
    },
    /// The library with transactions cannot be used.
    #[error("cannot use libxenstore: {cause}; install libxenstore4")]
    Library {
        /// What the loader said.
        cause: String,
    },
}

/// Outcome of [`XenStore::compare_and_write`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The node had the expected value and has the new one now.
    Written,
    /// The node had another value, which was left alone; `None`: it did not exist.
    Differs(Option<String>),
}

/// xenstore. Every request is a round trip to xenstored (tens of microseconds, more when it is busy).
#[async_trait]
pub trait XenStore: Send + Sync {
    /// A node's value; `None` if it does not exist.
    async fn read(&self, path: &str) -> Result<Option<String>, StoreError>;

    /// Writes a node and creates it, and its parents, if needed.
    async fn write(&self, path: &str, value: &str) -> Result<(), StoreError>;

    /// The names of a node's children; empty if it has none or does not exist.
    async fn directory(&self, path: &str) -> Result<Vec<String>, StoreError>;

    /// Removes a node and all below it. No error when it does not exist.
    async fn rm(&self, path: &str) -> Result<(), StoreError>;

    /// Watches a node and all below it, or `@releaseDomain` / `@introduceDomain`.
    async fn watch(&self, path: &str) -> Result<Watch, StoreError>;

    /// In one transaction: if the node has the value `expected` (`None`: does not exist), writes `value`.
    async fn compare_and_write(&self, path: &str, expected: Option<&str>, value: &str) -> Result<Compared, StoreError>;

    /// Tells xenstored that a suspended domain was resumed (`XS_RESUME`). C xenstored fires no further `@releaseDomain` for the
    /// domain without it; oxenstored does not mind.
    async fn resume_domain(&self, domid: DomId) -> Result<(), StoreError>;

    /// In one transaction: withdraws a suspend request that the guest has not taken yet. `Written`: withdrawn, the guest will
    /// not suspend. `Differs`: nothing was pending, or the guest has taken it and will suspend.
    async fn withdraw_suspend(&self, domid: DomId) -> Result<Compared, StoreError> {
        self.compare_and_write(&shutdown_path(domid), Some("suspend"), "").await
    }
}

/// Where the toolstack asks a domain to suspend, reboot or power off.
#[must_use]
pub fn shutdown_path(domid: DomId) -> String {
    format!("/local/domain/{domid}/control/shutdown")
}

/// A subscription to changes below a path: level-triggered, so many changes may be told once; a slow subscriber holds up nobody.
#[derive(Debug)]
pub struct Watch {
    changes: watch::Receiver<u64>,
}

impl Watch {
    /// A subscription that is told of each change of `changes`; counts as changed from the start, as in xenstore.
    #[must_use]
    pub fn new(mut changes: watch::Receiver<u64>) -> Self {
        changes.mark_changed();
        Self { changes }
    }

    /// Waits until something changed since the last return, or since the watch was made. Cancel-safe.
    ///
    /// # Errors
    /// [`StoreError::Gone`] when xenstored is gone; nothing will ever change.
    pub async fn changed(&mut self) -> Result<(), StoreError> {
        self.changes.changed().await.map_err(|_| StoreError::Gone)
    }
}
