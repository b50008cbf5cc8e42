//! A device of a guest, and the words every subkind is driven with.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a device is to the guest. [`fmt::Display`] gives Xen's word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A network interface, `vif` in xenstore.
    Nic,
    /// A block device, `vbd` in xenstore.
    Disk,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Nic => "vif",
            Kind::Disk => "vbd",
        })
    }
}

/// One device of one domain, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Nic or disk.
    pub kind: Kind,
    /// The domain it belongs to.
    pub domid: u32,
    /// Xen's number of it within its kind (`0` for the first vif, `51712` for xvda).
    pub devid: u32,
    /// What the host calls it. A nic: its vif, and for an HVM guest the `-emu` tap of the emulated card. A
    /// disk: the guest's name for it and the backend's target.
    pub names: Vec<String>,
    /// The backend's xenstore values: `mode`, `device-type`, `params`, `dev`, `script` and so on.
    pub params: BTreeMap<String, String>,
}

impl Device {
    /// One value of the backend's xenstore directory.
    #[must_use]
    pub fn param(&self, key: &str) -> Option<&str> {
        self.params.get(key).map(String::as_str)
    }

    /// Whether `name` is one of the names an operator might use for this device: one of `names`, the guest's
    /// name for it (`dev`), or `vif/0`, `vbd/51712`.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
            || self.param("dev") == Some(name)
            || name == format!("{}/{}", self.kind, self.devid)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of domain {}", self.kind, self.devid, self.domid)?;
        if !self.names.is_empty() {
            write!(f, " ({})", self.names.join(", "))?;
        }
        Ok(())
    }
}

/// Which epoch a phase belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochContext {
    /// The epoch's number; grows by one or more from phase round to phase round.
    pub epoch: u64,
    /// Whether the backup may activate this epoch, so that its output must be held until it is acknowledged.
    pub armed: bool,
}

/// How a protection ends for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// This host owns the guest: held output flows, then everything is put back as it was found.
    Release,
    /// It does not: held output is dropped, and the device stays sealed.
    Discard,
    /// Everything stays as it is in the kernel; only the handle is forgotten.
    Hold,
}

/// What a device holds back and has lost, since it was set up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Packets (nic) or requests (disk) held now.
    pub queued: u64,
    /// Bytes held now.
    pub queued_bytes: u64,
    /// Packets lost because more than the limit was to be held, or because somebody reset the buffer.
    pub dropped: u64,
}

impl std::ops::AddAssign for DeviceStats {
    fn add_assign(&mut self, other: Self) {
        self.queued += other.queued;
        self.queued_bytes += other.queued_bytes;
        self.dropped += other.dropped;
    }
}
