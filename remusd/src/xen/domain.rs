//! What Xen says about domains and the host.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::DomId;

/// How a guest is virtualised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    /// Paravirtualised: needs shadow paging for log-dirty.
    Pv,
    /// Hardware-assisted without a device model.
    Pvh,
    /// Hardware-assisted with a device model (QEMU) whose state is part of an epoch.
    Hvm,
}

impl fmt::Display for GuestType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pv => "PV",
            Self::Pvh => "PVH",
            Self::Hvm => "HVM",
        })
    }
}

/// Why a domain stopped itself: `SHUTDOWN_*` of Xen's `public/sched.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownReason {
    /// The guest powered off (0).
    Poweroff,
    /// The guest wants to be started anew (1).
    Reboot,
    /// The guest suspended, on request (2).
    Suspend,
    /// The guest's kernel crashed (3).
    Crash,
    /// The guest's Xen watchdog fired (4).
    Watchdog,
    /// The guest prepares to be rebuilt in place (5).
    SoftReset,
    /// A reason that this version does not know.
    Other(u8),
}

impl ShutdownReason {
    /// From Xen's number.
    #[must_use]
    pub fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Poweroff,
            1 => Self::Reboot,
            2 => Self::Suspend,
            3 => Self::Crash,
            4 => Self::Watchdog,
            5 => Self::SoftReset,
            other => Self::Other(other),
        }
    }

    /// Xen's number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Poweroff => 0,
            Self::Reboot => 1,
            Self::Suspend => 2,
            Self::Crash => 3,
            Self::Watchdog => 4,
            Self::SoftReset => 5,
            Self::Other(code) => code,
        }
    }
}

impl fmt::Display for ShutdownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Poweroff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
            Self::Suspend => f.write_str("suspend"),
            Self::Crash => f.write_str("crash"),
            Self::Watchdog => f.write_str("watchdog"),
            Self::SoftReset => f.write_str("soft-reset"),
            Self::Other(code) => write!(f, "shutdown reason {code}"),
        }
    }
}

/// The state of a domain; the flags are independent of each other (a suspended domain may also be paused).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DomainState {
    /// Being torn down, or a zombie whose memory is still held.
    pub dying: bool,
    /// Stopped by control software (`xl pause`).
    pub paused: bool,
    /// Has a vCPU on a physical CPU at this moment.
    pub running: bool,
    /// Why the guest stopped itself, if it did.
    pub shutdown: Option<ShutdownReason>,
}

impl DomainState {
    /// Suspended on request and not being torn down.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        !self.dying && self.shutdown == Some(ShutdownReason::Suspend)
    }
}

/// One domain, from `XEN_DOMCTL_getdomaininfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    /// The domain's id on this host.
    pub domid: DomId,
    /// The domain's UUID: the same after migration.
    pub uuid: Uuid,
    /// How it is virtualised.
    pub guest_type: GuestType,
    /// Whether it uses hardware-assisted paging, which is what lets its writes be logged.
    pub hap: bool,
    /// Its state.
    pub state: DomainState,
    /// Bytes that it holds now.
    pub memory: u64,
    /// Bytes that it may hold.
    pub max_memory: u64,
    /// vCPUs online.
    pub vcpus: u32,
    /// CPU time used by all vCPUs, nanoseconds.
    pub cpu_time_ns: u64,
}

/// The running hypervisor's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XenVersion {
    /// 4 of 4.17.
    pub major: u32,
    /// 17 of 4.17.
    pub minor: u32,
    /// What follows, for example ".7-pre".
    pub extra: String,
}

impl fmt::Display for XenVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}{}", self.major, self.minor, self.extra)
    }
}

/// The host, from `XEN_SYSCTL_physinfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Bytes of memory in the host.
    pub memory: u64,
    /// Bytes given to no domain (being scrubbed included: soon free).
    pub free_memory: u64,
    /// CPUs online.
    pub cpus: u32,
    /// The hypervisor has hardware-assisted paging.
    pub hap: bool,
    /// The hypervisor has shadow paging (Debian's has not).
    pub shadow: bool,
}
