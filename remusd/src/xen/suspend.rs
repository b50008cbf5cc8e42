//! Suspending a guest and resuming it, as libxl does (libxl_dom_suspend.c of Xen 4.17), but waiting on events with one deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::domain::{GuestType, ShutdownReason};
use super::hypervisor::{HvmParam, Hypervisor, XenError};
use super::store::{Compared, StoreError, Watch, XenStore, shutdown_path};
use crate::ids::DomId;

/// Why a guest did not suspend.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    /// The guest did not take the request; it was withdrawn, so the guest will not suspend later.
    #[error(
        "domain {domid} did not take the suspend request within {waited:?}; it is hung, or has no Xen drivers: look at its console"
    )]
    NotAcknowledged {
        /// The domain.
        domid: DomId,
        /// How long it had.
        waited: Duration,
    },
    /// The guest took the request but was not suspended in time. It may still suspend at any later moment: [`Suspender::settle`].
    #[error(
        "domain {domid} took the suspend request but was not suspended within {waited:?}; it may be overloaded: allow more time"
    )]
    Timeout {
        /// The domain.
        domid: DomId,
        /// How long it had.
        waited: Duration,
    },
    /// The guest stopped for another reason.
    #[error("domain {domid} stopped by itself: {reason}")]
    WrongReason {
        /// The domain.
        domid: DomId,
        /// Why it stopped.
        reason: ShutdownReason,
    },
    /// The domain is gone or being destroyed.
    #[error("domain {domid} is gone: it was destroyed")]
    DomainGone {
        /// The domain.
        domid: DomId,
    },
    /// Control software has paused the domain, so it cannot react. Its memory does not change either.
    #[error("domain {domid} is paused; unpause it with `xl unpause {domid}`")]
    Paused {
        /// The domain.
        domid: DomId,
    },
    /// The domain was suspended before it was asked.
    #[error(
        "domain {domid} is suspended already, by something else (xl save, xl migrate) or by an earlier run; `remus recover` resumes it"
    )]
    AlreadySuspended {
        /// The domain.
        domid: DomId,
    },
    /// The hypervisor refused a call.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// xenstore refused a request.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How a suspend went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspended {
    /// When the guest was asked.
    pub asked: Instant,
    /// Whether it was asked, and not stopped from outside (no PV drivers).
    pub cooperated: bool,
    /// When it was seen to be suspended.
    pub suspended: Instant,
}

/// What became of a guest after a failed suspend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It runs and no request is pending.
    Running,
    /// It had suspended after all and was resumed.
    Resumed,
    /// It has taken a request and is still not suspended.
    Undecided,
    /// It is gone or has stopped for another reason.
    Ended,
}

/// Suspends and resumes one domain. Watches `@releaseDomain` for its whole life: registering costs xenstored a scan. Does not watch
/// for the guest to take the request, which would cost two more events per epoch: a transaction tells at the deadline.
pub struct Suspender {
    domid: DomId,
    hypervisor: Arc<dyn Hypervisor>,
    store: Arc<dyn XenStore>,
    path: String,
    releases: Watch,
    /// A request may be pending or taken; at first because an earlier run may have left one.
    outstanding: bool,
}

enum Seen {
    Running,
    Paused,
    Suspended,
}

impl Suspender {
    /// Registers the watch.
    ///
    /// # Errors
    /// [`SuspendError::DomainGone`] if there is no such domain, [`SuspendError::Store`] if xenstored refuses a watch.
    pub async fn new(
        domid: DomId,
        hypervisor: Arc<dyn Hypervisor>,
        store: Arc<dyn XenStore>,
    ) -> Result<Self, SuspendError> {
        let path = shutdown_path(domid);
        let releases = store.watch("@releaseDomain").await?;
        if hypervisor.domain(domid).await?.is_none() {
            return Err(SuspendError::DomainGone { domid });
        }
        Ok(Self { domid, hypervisor, store, path, releases, outstanding: true })
    }

    /// The domain.
    #[must_use]
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// Suspends the guest: asks it through xenstore, or stops it if it has no PV drivers, and waits until Xen says that it is
    /// suspended. Returns at the latest at `deadline` plus one round trip to xenstored. If the future is dropped the request stays
    /// pending: call [`settle`](Self::settle).
    ///
    /// # Errors
    /// See [`SuspendError`]; after `NotAcknowledged` and `Paused` the guest will not suspend later, after `Timeout` it may.
    pub async fn suspend(&mut self, deadline: Instant) -> Result<Suspended, SuspendError> {
        match self.look().await? {
            Seen::Running => {}
            Seen::Paused => return Err(SuspendError::Paused { domid: self.domid }),
            Seen::Suspended => return Err(SuspendError::AlreadySuspended { domid: self.domid }),
        }
        let asked = Instant::now();
        let cooperated = self.cooperates().await?;
        self.outstanding = true;
        if cooperated {
            self.store.write(&self.path, "suspend").await?;
        } else {
            self.hypervisor.shutdown(self.domid, ShutdownReason::Suspend).await?;
        }
        loop {
            match timeout_at(deadline.into(), self.event()).await {
                Ok(event) => event?,
                Err(_) => return self.give_up(asked, cooperated).await,
            }
            if matches!(self.look().await?, Seen::Suspended) {
                self.outstanding = false;
                return Ok(Suspended { asked, cooperated, suspended: Instant::now() });
            }
        }
    }

    /// Resumes the guest where it stands, and tells xenstored.
    ///
    /// # Errors
    /// [`SuspendError::Xen`] when the hypervisor refuses (a domain that is gone), [`SuspendError::Store`] when the guest runs but
    /// xenstored could not be told: then C xenstored will not report its next suspend.
    pub async fn resume(&mut self) -> Result<(), SuspendError> {
        self.hypervisor.resume_fast(self.domid).await?;
        self.store.resume_domain(self.domid).await?;
        Ok(())
    }

    /// Brings the guest back to running after a failed or abandoned suspend: withdraws a pending request; if the guest has taken it,
    /// waits up to `patience` for the late suspend and resumes it. What an earlier run has asked is not known: then a guest that has
    /// taken its request cannot be told from one that was resumed long ago, and both are `Undecided`, after `patience`.
    ///
    /// # Errors
    /// [`SuspendError::Xen`] or [`SuspendError::Store`] when the state cannot be told; call again.
    pub async fn settle(&mut self, patience: Duration) -> Result<Settled, SuspendError> {
        let deadline = Instant::now() + patience;
        // A node that is not there was never written: no request, taken or not.
        let withdrawn = !self.outstanding
            || matches!(self.store.withdraw_suspend(self.domid).await?, Compared::Written | Compared::Differs(None));
        loop {
            match self.look().await {
                Ok(Seen::Suspended) => {
                    self.resume().await?;
                    self.outstanding = false;
                    return Ok(Settled::Resumed);
                }
                Ok(_) if withdrawn => {
                    self.outstanding = false;
                    return Ok(Settled::Running);
                }
                Ok(_) => {}
                Err(SuspendError::DomainGone { .. } | SuspendError::WrongReason { .. }) => {
                    return Ok(Settled::Ended);
                }
                Err(other) => return Err(other),
            }
            match timeout_at(deadline.into(), self.event()).await {
                Ok(event) => event?,
                // Once more: a request whose write was under way when its future was dropped may have landed after the first try.
                Err(_) if self.store.withdraw_suspend(self.domid).await? == Compared::Written => {
                    self.outstanding = false;
                    return Ok(Settled::Running);
                }
                Err(_) => return Ok(Settled::Undecided),
            }
        }
    }

    /// Waits for the next change of any domain's life. Also serves as the domain's monitor between suspends: check the domain's
    /// state after each return. Cancel-safe.
    ///
    /// # Errors
    /// [`SuspendError::Store`] when xenstored is gone.
    pub async fn event(&mut self) -> Result<(), SuspendError> {
        Ok(self.releases.changed().await?)
    }

    async fn look(&self) -> Result<Seen, SuspendError> {
        let domid = self.domid;
        let Some(info) = self.hypervisor.domain(domid).await? else {
            return Err(SuspendError::DomainGone { domid });
        };
        if info.state.dying {
            return Err(SuspendError::DomainGone { domid });
        }
        match info.state.shutdown {
            Some(ShutdownReason::Suspend) => Ok(Seen::Suspended),
            Some(reason) => Err(SuspendError::WrongReason { domid, reason }),
            None if info.state.paused => Ok(Seen::Paused),
            None => Ok(Seen::Running),
        }
    }

    /// Whether the guest is to be asked. An HVM guest without event callback has no PV drivers; one in an ACPI sleep state
    /// cannot react: both are stopped from outside.
    async fn cooperates(&self) -> Result<bool, SuspendError> {
        let domid = self.domid;
        let Some(info) = self.hypervisor.domain(domid).await? else {
            return Err(SuspendError::DomainGone { domid });
        };
        if info.guest_type != GuestType::Hvm {
            return Ok(true);
        }
        let callback = self.hypervisor.hvm_param(domid, HvmParam::CallbackIrq).await?;
        let sleep = self.hypervisor.hvm_param(domid, HvmParam::AcpiSState).await?;
        Ok(callback != 0 && sleep == 0)
    }

    async fn give_up(&mut self, asked: Instant, cooperated: bool) -> Result<Suspended, SuspendError> {
        let domid = self.domid;
        // The transaction decides: the guest may take the request at this very moment.
        if cooperated && self.store.withdraw_suspend(domid).await? == Compared::Written {
            self.outstanding = false;
            return Err(SuspendError::NotAcknowledged { domid, waited: asked.elapsed() });
        }
        Err(SuspendError::Timeout { domid, waited: asked.elapsed() })
    }
}
