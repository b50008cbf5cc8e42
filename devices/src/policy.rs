//! Devices that may go unhandled.

use serde::{Deserialize, Serialize};

use crate::device::{Device, Kind};

/// One rule by which a device nobody takes is let pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allow {
    /// Disks the guest cannot write (`mode` is `r`): both hosts see the same bytes.
    ReadOnlyDisks,
    /// CD-ROM drives (`device-type` is `cdrom`).
    CdRoms,
    /// The device of this name, as [`Device::is_called`] understands it. The operator takes the risk.
    Named(String),
    /// Every device of a kind. The operator takes the risk.
    EveryOf(Kind),
}

/// Which devices may go without a subkind. The default lets read-only disks and CD-ROMs pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The rules; one that fits is enough.
    pub allow: Vec<Allow>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { allow: vec![Allow::ReadOnlyDisks, Allow::CdRoms] }
    }
}

impl Policy {
    /// Lets nothing pass.
    #[must_use]
    pub fn strict() -> Self {
        Self { allow: Vec::new() }
    }

    /// The default, and these names too.
    #[must_use]
    pub fn with_names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        let mut policy = Self::default();
        policy.allow.extend(names.into_iter().map(|n| Allow::Named(n.into())));
        policy
    }

    /// The rule that lets `device` pass, if one does.
    #[must_use]
    pub fn lets_pass(&self, device: &Device) -> Option<&Allow> {
        self.allow.iter().find(|rule| rule.fits(device))
    }
}

impl Allow {
    /// Whether this rule speaks of `device`.
    #[must_use]
    pub fn fits(&self, device: &Device) -> bool {
        match self {
            Allow::ReadOnlyDisks => device.kind == Kind::Disk && device.param("mode") == Some("r"),
            Allow::CdRoms => device.kind == Kind::Disk && device.param("device-type") == Some("cdrom"),
            Allow::Named(name) => device.is_called(name),
            Allow::EveryOf(kind) => device.kind == *kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(values: &[(&str, &str)]) -> Device {
        Device {
            kind: Kind::Disk,
            domid: 1,
            devid: 51712,
            names: vec!["xvda".into(), "/dev/vg/a".into()],
            params: values.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        }
    }

    #[test]
    fn default_lets_only_unwritable_disks_pass() {
        let policy = Policy::default();
        assert!(policy.lets_pass(&disk(&[("mode", "w")])).is_none());
        assert!(policy.lets_pass(&disk(&[])).is_none());
        assert_eq!(policy.lets_pass(&disk(&[("mode", "r")])), Some(&Allow::ReadOnlyDisks));
        assert_eq!(policy.lets_pass(&disk(&[("mode", "w"), ("device-type", "cdrom")])), Some(&Allow::CdRoms));
    }

    #[test]
    fn a_nic_with_a_read_only_mode_does_not_pass() {
        let mut nic = disk(&[("mode", "r"), ("device-type", "cdrom")]);
        nic.kind = Kind::Nic;
        assert!(Policy::default().lets_pass(&nic).is_none());
    }

    #[test]
    fn names_and_kinds() {
        let d = disk(&[("mode", "w"), ("dev", "hda")]);
        for name in ["xvda", "/dev/vg/a", "hda", "vbd/51712"] {
            assert!(Policy::with_names([name]).lets_pass(&d).is_some(), "{name}");
        }
        assert!(Policy::with_names(["xvd", "vbd/0"]).lets_pass(&d).is_none());
        let every = |kind| Policy { allow: vec![Allow::EveryOf(kind)] };
        assert!(every(Kind::Disk).lets_pass(&d).is_some());
        assert!(every(Kind::Nic).lets_pass(&d).is_none());
        assert!(Policy::strict().lets_pass(&disk(&[("mode", "r")])).is_none());
    }
}
