//! The hypervisor calls that remusd needs.

use async_trait::async_trait;
use bytes::Bytes;

use super::domain::{DomainInfo, HostInfo, ShutdownReason, XenVersion};
use crate::ids::DomId;

/// A failed hypervisor call.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    /// No such domain.
    #[error("domain {domid} does not exist; `xl list` shows the domains of this host")]
    NoDomain {
        /// The domain asked for.
        domid: DomId,
    },
    /// A Xen library cannot be used.
    #[error(
        "cannot use the Xen library {library}: {cause}; is this a dom0 with the libraries of its Xen version (libxenmisc4.17 on Debian 12)?"
    )]
    Library {
        /// Its file name.
        library: String,
        /// What the loader said.
        cause: String,
    },
    /// The hypervisor interface cannot be opened.
    #[error("cannot open the hypervisor interface: {cause}; this must run as root in dom0 with xen-privcmd loaded")]
    Open {
        /// What the library said.
        cause: String,
    },
    /// A call failed.
    #[error("{call} failed on domain {domid}: {cause}")]
    Call {
        /// The library's function.
        call: &'static str,
        /// The domain it was for.
        domid: DomId,
        /// What the system said.
        cause: String,
    },
    /// A call about the host failed.
    #[error("{call} failed: {cause}")]
    HostCall {
        /// The library's function.
        call: &'static str,
        /// What the system said.
        cause: String,
    },
    /// The domain uses something that its memory cannot be copied with.
    #[error("the memory of domain {domid} cannot be copied: {cause}")]
    Memory {
        /// The domain.
        domid: DomId,
        /// What stands in the way, and what to do.
        cause: String,
    },
    /// The thread that owns the interface has ended.
    #[error("the thread that owns the hypervisor interface has ended: a call panicked; restart remusd")]
    OwnerGone,
}

/// HVM parameters that remusd reads (`public/hvm/params.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HvmParam {
    /// How the guest is told of events; 0: it has no PV drivers and cannot suspend co-operatively.
    CallbackIrq = 0,
    /// Device model's domain id.
    DmDomain = 13,
    /// ACPI sleep state; not 0: asleep, cannot suspend co-operatively.
    AcpiSState = 14,
}

/// Whether a domain's writes can be logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogDirty {
    /// They can.
    Supported,
    /// They cannot; a sentence for the operator says why and what to do.
    Unsupported(String),
}

impl LogDirty {
    /// Judges from what Xen says, without touching the domain.
    #[must_use]
    pub fn judge(domain: &DomainInfo, host: &HostInfo) -> Self {
        use super::domain::GuestType;
        if domain.hap || host.shadow {
            return Self::Supported;
        }
        Self::Unsupported(match domain.guest_type {
            GuestType::Pv => format!(
                "domain {} is PV and this hypervisor is built without shadow paging (as Debian's is), so its writes cannot be \
                 logged; make it a PVH guest (type=\"pvh\")",
                domain.domid
            ),
            GuestType::Pvh | GuestType::Hvm if host.hap => format!(
                "domain {} runs without hardware-assisted paging and this hypervisor is built without shadow paging; \
                 remove hap=0 from its configuration",
                domain.domid
            ),
            GuestType::Pvh | GuestType::Hvm => format!(
                "this host has no hardware-assisted paging (EPT or NPT) and its hypervisor no shadow paging, so the writes of \
                 domain {} cannot be logged; use a host with EPT or NPT, and check that the firmware enables it",
                domain.domid
            ),
        })
    }
}

/// The hypervisor.
///
/// The real one does each call on one owner thread (the interface is not `Send`); calls are queued there in order. None
/// waits for a guest: each takes microseconds, apart from [`hvm_context`](Hypervisor::hvm_context) (a millisecond),
/// [`log_dirty_off`](Hypervisor::log_dirty_off) (grows with the guest's memory) and [`destroy`](Hypervisor::destroy)
/// (seconds for a big guest: the real one gives it a thread and interface of its own). A dropped future does not cancel its call.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// All domains, dom0 first.
    async fn domains(&self) -> Result<Vec<DomainInfo>, XenError>;

    /// One domain; `None` if there is none of this id.
    async fn domain(&self, domid: DomId) -> Result<Option<DomainInfo>, XenError>;

    /// Stops a domain's vCPUs. Counts: each pause needs its unpause.
    async fn pause(&self, domid: DomId) -> Result<(), XenError>;

    /// Takes back one pause.
    async fn unpause(&self, domid: DomId) -> Result<(), XenError>;

    /// Resumes a suspended domain where it stands (`xc_domain_resume` with fast=1: the guest's suspend call returns 1,
    /// "cancelled"). Follow with [`XenStore::resume_domain`](super::XenStore::resume_domain), or the next suspend is not seen.
    /// Harmless on a domain that is not shut down.
    async fn resume_fast(&self, domid: DomId) -> Result<(), XenError>;

    /// Makes a domain stop for `reason` without its co-operation (`xc_domain_shutdown`).
    async fn shutdown(&self, domid: DomId, reason: ShutdownReason) -> Result<(), XenError>;

    /// Destroys a domain's memory and vCPUs. Its devices and xenstore entries are the toolstack's: prefer `xl destroy`.
    async fn destroy(&self, domid: DomId) -> Result<(), XenError>;

    /// An HVM or PVH domain's parameter.
    async fn hvm_param(&self, domid: DomId, param: HvmParam) -> Result<u64, XenError>;

    /// The platform and vCPU state of an HVM or PVH domain, as libxc's `HVM_CONTEXT` record has it.
    async fn hvm_context(&self, domid: DomId) -> Result<Bytes, XenError>;

    /// Ends logging of writes. No error when it is off already.
    async fn log_dirty_off(&self, domid: DomId) -> Result<(), XenError>;

    /// Whether writes are logged now. Costly and intrusive: Xen has no such question, so this tries to turn logging on and, if
    /// that worked, off again. For tests and `doctor`, never while a saver runs.
    async fn log_dirty_is_on(&self, domid: DomId) -> Result<bool, XenError>;

    /// The running hypervisor's version.
    async fn version(&self) -> Result<XenVersion, XenError>;

    /// The host's memory, CPUs and abilities.
    async fn host(&self) -> Result<HostInfo, XenError>;

    /// Whether a domain's writes can be logged. Does not touch the domain.
    async fn log_dirty(&self, domid: DomId) -> Result<LogDirty, XenError> {
        let host = self.host().await?;
        let domain = self.domain(domid).await?.ok_or(XenError::NoDomain { domid })?;
        Ok(LogDirty::judge(&domain, &host))
    }
}
