//! The real hypervisor: the crate xenctrl for domains, pause and the host, our own bindings for the rest.

use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;
use xenctrl::{XenControl, xc_domaininfo_t};

use super::domain::{DomainInfo, GuestType, HostInfo, ShutdownReason, XenVersion};
use super::ffi::{self, Control};
use super::hypervisor::{HvmParam, Hypervisor, XenError};
use super::owner::{Lost, Owner};
use crate::ids::DomId;

const PAGE: u64 = 4096;
const FLAG_HVM: u32 = 1 << 1;
const FLAG_HAP: u32 = 1 << 8;
/// `XEN_X86_EMU_LAPIC`: a PVH guest has this one emulated device and no other.
const EMULATES_LAPIC: u32 = 1;
const CAPABILITY_HAP: u32 = 1 << 3;
const CAPABILITY_SHADOW: u32 = 1 << 4;

/// Both handles, for the owner thread.
struct Handles {
    domains: XenControl,
    control: Control,
}

/// The hypervisor of this host.
pub struct XenHypervisor {
    owner: Owner<Handles>,
}

impl XenHypervisor {
    /// Opens the hypervisor interface. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`XenError::Library`] or [`XenError::Open`]; the latter also when this is not a dom0.
    pub fn open() -> Result<Self, XenError> {
        let open = || {
            let control = Control::open()?;
            let domains = XenControl::new_default()
                .map_err(|error| XenError::Open { cause: format!("{error}: {}", io::Error::last_os_error()) })?;
            Ok(Handles { domains, control })
        };
        let owner = Owner::start("xen", open, |cause| XenError::Open { cause })?;
        Ok(Self { owner })
    }

    async fn call<R, F>(&self, call: F) -> Result<R, XenError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Handles) -> Result<R, XenError> + Send + 'static,
    {
        match self.owner.call(call).await {
            Ok(answer) => answer,
            Err(Lost) => Err(XenError::OwnerGone),
        }
    }
}

/// The crate keeps only a name of libxenctrl's own for an error; the system's reason is still in errno.
fn errno(call: &'static str, domid: DomId) -> XenError {
    ffi::failed(call, domid, &io::Error::last_os_error())
}

/// The first domain from `domid` on.
fn next_domain(domains: &XenControl, domid: u32) -> Result<Option<DomainInfo>, XenError> {
    const CALL: &str = "xc_domain_getinfolist";
    match domains.domain_getinfolist(domid) {
        Ok(found) => Ok(found.as_ref().map(describe)),
        Err(_) => match errno(CALL, DomId(domid)) {
            XenError::NoDomain { .. } => Ok(None),
            other => Err(other),
        },
    }
}

fn describe(info: &xc_domaininfo_t) -> DomainInfo {
    let guest_type = if info.flags & FLAG_HVM == 0 {
        GuestType::Pv
    } else if info.arch_config.emulation_flags & !EMULATES_LAPIC == 0 {
        GuestType::Pvh
    } else {
        GuestType::Hvm
    };
    DomainInfo {
        domid: DomId(u32::from(info.domain)),
        uuid: Uuid::from_bytes(info.handle),
        guest_type,
        hap: info.flags & FLAG_HAP != 0,
        state: ffi::state_of_flags(info.flags),
        memory: info.tot_pages * PAGE,
        max_memory: info.max_pages * PAGE,
        vcpus: info.nr_online_vcpus,
        cpu_time_ns: info.cpu_time,
    }
}

#[async_trait]
impl Hypervisor for XenHypervisor {
    async fn domains(&self) -> Result<Vec<DomainInfo>, XenError> {
        self.call(|handles| {
            let mut list = Vec::new();
            let mut first = 0;
            while let Some(info) = next_domain(&handles.domains, first)? {
                first = info.domid.0 + 1;
                list.push(info);
            }
            Ok(list)
        })
        .await
    }

    async fn domain(&self, domid: DomId) -> Result<Option<DomainInfo>, XenError> {
        self.call(move |handles| {
            let found = next_domain(&handles.domains, domid.0)?;
            Ok(found.filter(|info| info.domid == domid))
        })
        .await
    }

    async fn pause(&self, domid: DomId) -> Result<(), XenError> {
        self.call(move |handles| {
            let paused = handles.domains.domain_pause(domid.0);
            paused.map_err(|_| errno("xc_domain_pause", domid))
        })
        .await
    }

    async fn unpause(&self, domid: DomId) -> Result<(), XenError> {
        self.call(move |handles| {
            let unpaused = handles.domains.domain_unpause(domid.0);
            unpaused.map_err(|_| errno("xc_domain_unpause", domid))
        })
        .await
    }

    async fn resume_fast(&self, domid: DomId) -> Result<(), XenError> {
        self.call(move |handles| handles.control.resume_fast(domid).map(drop)).await
    }

    async fn shutdown(&self, domid: DomId, reason: ShutdownReason) -> Result<(), XenError> {
        self.call(move |handles| handles.control.shutdown(domid, reason)).await
    }

    async fn destroy(&self, domid: DomId) -> Result<(), XenError> {
        // Frees all memory: seconds for a big guest, during which the owner thread must serve the others.
        tokio::task::spawn_blocking(move || Control::open()?.destroy(domid)).await.map_err(|_| XenError::OwnerGone)?
    }

    async fn hvm_param(&self, domid: DomId, param: HvmParam) -> Result<u64, XenError> {
        self.call(move |handles| handles.control.hvm_param(domid, param as u32)).await
    }

    async fn hvm_context(&self, domid: DomId) -> Result<Bytes, XenError> {
        self.call(move |handles| handles.control.hvm_context(domid).map(Bytes::from)).await
    }

    async fn log_dirty_off(&self, domid: DomId) -> Result<(), XenError> {
        self.call(move |handles| handles.control.log_dirty_off(domid)).await
    }

    async fn log_dirty_is_on(&self, domid: DomId) -> Result<bool, XenError> {
        self.call(move |handles| handles.control.log_dirty_is_on(domid)).await
    }

    async fn version(&self) -> Result<XenVersion, XenError> {
        self.call(|handles| {
            let (major, minor, extra) = handles.control.version()?;
            Ok(XenVersion { major, minor, extra })
        })
        .await
    }

    async fn host(&self) -> Result<HostInfo, XenError> {
        self.call(|handles| {
            let info = handles.domains.physinfo().map_err(|_| XenError::HostCall {
                call: "xc_physinfo",
                cause: io::Error::last_os_error().to_string(),
            })?;
            Ok(HostInfo {
                memory: info.total_pages * PAGE,
                free_memory: (info.free_pages + info.scrub_pages) * PAGE,
                cpus: info.nr_cpus,
                hap: info.capabilities & CAPABILITY_HAP != 0,
                shadow: info.capabilities & CAPABILITY_SHADOW != 0,
            })
        })
        .await
    }
}
