//! From the device directories in xenstore to devices, and to what must be refused.
//!
//! Every kind of device that libxl knows is listed here with a decision (the names are libxl's, from
//! `libxl_types_internal.idl` of Xen 4.17). A kind that is not listed is refused: it may be a way out of the
//! guest that nobody holds back (rule R1), or a store that the backup lacks (R5).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::{Device, Kind};

/// One device directory: `/libxl/<domid>/device/<kind>/<devid>`, or the same below
/// `/local/domain/<domid>/device`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// The name of the directory: `vif`, `vbd`, `console`.
    pub kind: String,
    /// The number below it. 0 for kinds that have none (`suspend`).
    pub devid: u32,
    /// Whether it was found below `/libxl`, which only the toolstack writes. What is found only below the
    /// guest's own directory is not trusted to name a backend.
    pub from_libxl: bool,
    /// The value of its `backend`, a path; absent or empty when it has none.
    pub backend: Option<String>,
    /// What the directory `backend` points to contains.
    pub values: BTreeMap<String, String>,
}

/// A device that keeps the domain from being protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its kind and number: `pci/0`.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}: {}", self.name, self.reason)
    }
}

/// A device that is let be, and what that means. For the operator's eyes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncovered {
    /// Its kind and number.
    pub name: String,
    /// What is not kept in step with the backup.
    pub note: &'static str,
}

/// The devices of a domain, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Classified {
    /// Nics and disks, for a [`crate::DeviceSet`].
    pub devices: Vec<Device>,
    /// What is in the way: refuse the domain with these reasons.
    pub refused: Vec<Refused>,
    /// What is harmless but not covered by rule R1.
    pub uncovered: Vec<Uncovered>,
}

enum Verdict {
    Nic,
    Disk,
    /// Nothing of the guest's goes through it.
    Harmless,
    /// Goes on at the backup by itself, but its output is not held back.
    Uncovered(&'static str),
    Refuse(&'static str),
}

fn verdict(kind: &str) -> Verdict {
    match kind {
        "vif" => Verdict::Nic,
        "vbd" => Verdict::Disk,
        // `suspend/event-channel`, the doorbell for suspending: no output.
        "suspend" => Verdict::Harmless,
        // Keyboard and pointer bring input only; on restore the backend starts afresh.
        "vkbd" => Verdict::Harmless,
        "console" => Verdict::Uncovered("what the guest prints is not held back"),
        "vuart" => Verdict::Uncovered("what the guest prints on its emulated uart is not held back"),
        "vfb" => Verdict::Uncovered("the guest's screen (VNC) is not held back"),
        "pci" => Verdict::Refuse("a passed-through device cannot be restored on another host"),
        "vtpm" => Verdict::Refuse("a virtual TPM keeps its state outside the guest"),
        "qusb" | "vusb" => Verdict::Refuse("USB devices cannot be restored on another host"),
        "9pfs" => Verdict::Refuse("the guest writes a directory of this host through it"),
        "pvcalls" => Verdict::Refuse("its sockets live in this host's kernel"),
        "vdispl" | "vsnd" => Verdict::Refuse("its output is not held back"),
        "virtio" => Verdict::Refuse("virtio devices are not supported"),
        _ => Verdict::Refuse("nothing is known about devices of this kind"),
    }
}

/// Sorts the device directories of domain `domid`. `device_model` says whether a device model runs for the
/// guest's emulated cards (an HVM guest), so that each nic also has a tap.
///
/// The same device found below `/libxl` and below the guest's directory counts once.
#[must_use]
pub fn classify(domid: u32, device_model: bool, nodes: &[Node]) -> Classified {
    let mut merged: BTreeMap<(&str, u32), &Node> = BTreeMap::new();
    for node in nodes {
        let known = merged.entry((node.kind.as_str(), node.devid)).or_insert(node);
        if node.from_libxl {
            *known = node;
        }
    }
    let mut result = Classified::default();
    for node in merged.into_values() {
        let name = format!("{}/{}", node.kind, node.devid);
        let device = match verdict(&node.kind) {
            Verdict::Harmless => continue,
            Verdict::Uncovered(note) => {
                result.uncovered.push(Uncovered { name, note });
                continue;
            }
            Verdict::Refuse(reason) => Err(reason.to_owned()),
            Verdict::Nic => backend_of(domid, node).map(|_| nic(domid, device_model, node)),
            Verdict::Disk => backend_of(domid, node).map(|backend| disk(domid, backend, node)),
        };
        match device {
            Ok(device) => result.devices.push(device),
            Err(reason) => result.refused.push(Refused { name, reason }),
        }
    }
    result
}

/// The kind in the backend's path, `/local/domain/<backend domid>/backend/<kind>/<domid>/<devid>`.
fn backend_of(domid: u32, node: &Node) -> Result<&str, String> {
    if !node.from_libxl {
        return Err("the toolstack does not know it; only the guest's own directory names it".into());
    }
    let path = node.backend.as_deref().unwrap_or_default();
    let parts: Vec<&str> = path.split('/').collect();
    let ["", "local", "domain", host, "backend", kind, guest, devid] = parts.as_slice() else {
        return Err(format!("its backend path {path:?} is not one"));
    };
    if *host != "0" {
        return Err(format!("its backend is in domain {host}: driver domains are not supported"));
    }
    if *guest != domid.to_string() || *devid != node.devid.to_string() {
        return Err(format!("its backend path {path:?} is another device's"));
    }
    Ok(kind)
}

/// A nic is called by its vif (`vifname` of the backend, or libxl's default), and with a device model also by
/// the tap of the emulated card, which libxl names by appending `-emu`.
fn nic(domid: u32, device_model: bool, node: &Node) -> Device {
    let vif = match node.values.get("vifname") {
        Some(name) if !name.is_empty() => name.clone(),
        _ => format!("vif{domid}.{}", node.devid),
    };
    let mut names = vec![vif];
    if device_model {
        names.push(format!("{}-emu", names[0]));
    }
    Device { kind: Kind::Nic, domid, devid: node.devid, names, params: node.values.clone() }
}

/// A disk is called by the guest's name for it and by its target. The kind of backend (`vbd`, `qdisk`) goes
/// into the parameters as `backend-kind`: what a subkind can do depends on it.
fn disk(domid: u32, backend: &str, node: &Node) -> Device {
    let mut params = node.values.clone();
    params.insert("backend-kind".into(), backend.to_owned());
    let names =
        ["dev", "params"].into_iter().filter_map(|key| params.get(key).filter(|v| !v.is_empty()).cloned()).collect();
    Device { kind: Kind::Disk, domid, devid: node.devid, names, params }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(kind: &str, devid: u32, backend: &str, values: &[(&str, &str)]) -> Node {
        Node {
            kind: kind.into(),
            devid,
            from_libxl: true,
            backend: Some(backend.into()),
            values: values.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        }
    }

    fn vif(devid: u32, values: &[(&str, &str)]) -> Node {
        node("vif", devid, &format!("/local/domain/0/backend/vif/3/{devid}"), values)
    }

    #[test]
    fn a_usual_pvh_guest() {
        let disk = node(
            "vbd",
            51712,
            "/local/domain/0/backend/vbd/3/51712",
            &[("dev", "xvda"), ("params", "/dev/vg/a"), ("mode", "w")],
        );
        let all = classify(
            3,
            false,
            &[
                vif(0, &[("bridge", "xenbr0")]),
                vif(1, &[("vifname", "front1")]),
                disk,
                node("console", 0, "/local/domain/0/backend/console/3/0", &[]),
                Node { kind: "suspend".into(), ..Node::default() },
            ],
        );
        assert!(all.refused.is_empty(), "{:?}", all.refused);
        assert_eq!(
            all.devices.iter().map(|d| d.names.clone()).collect::<Vec<_>>(),
            [vec!["xvda".to_owned(), "/dev/vg/a".into()], vec!["vif3.0".into()], vec!["front1".into()]]
        );
        assert_eq!(all.devices[0].param("backend-kind"), Some("vbd"));
        assert_eq!(all.devices[1].param("bridge"), Some("xenbr0"));
        assert_eq!(all.uncovered.len(), 1);
        assert_eq!(all.uncovered[0].name, "console/0");
    }

    #[test]
    fn an_hvm_nic_has_its_tap_too() {
        let all = classify(3, true, &[vif(0, &[]), vif(1, &[("vifname", "web")])]);
        assert_eq!(all.devices[0].names, ["vif3.0", "vif3.0-emu"]);
        assert_eq!(all.devices[1].names, ["web", "web-emu"]);
    }

    #[test]
    fn unknown_and_unprotectable_kinds_are_refused_by_name() {
        let kinds = ["pci", "vtpm", "vusb", "qusb", "9pfs", "pvcalls", "vdispl", "vsnd", "virtio", "argo", "qdisk", ""];
        for kind in kinds {
            let all = classify(3, false, &[node(kind, 2, "", &[])]);
            assert!(all.devices.is_empty() && all.uncovered.is_empty());
            assert_eq!(all.refused.len(), 1, "{kind}");
            assert!(all.refused[0].to_string().starts_with(&format!("device {kind}/2: ")));
        }
    }

    #[test]
    fn a_driver_domain_a_foreign_and_a_missing_backend_are_refused() {
        for (backend, word) in [
            ("/local/domain/7/backend/vif/3/0", "domain 7"),
            ("/local/domain/0/backend/vif/4/0", "another device's"),
            ("/local/domain/0/backend/vif/3/1", "another device's"),
            ("", "is not one"),
        ] {
            let all = classify(3, false, &[node("vif", 0, backend, &[])]);
            assert!(all.devices.is_empty());
            assert!(all.refused[0].reason.contains(word), "{:?}", all.refused);
        }
    }

    #[test]
    fn the_guests_own_directory_cannot_name_a_device_and_not_rename_one() {
        let mut forged = vif(0, &[("vifname", "eth0")]);
        forged.from_libxl = false;
        for nodes in [[forged.clone(), vif(0, &[])], [vif(0, &[]), forged.clone()]] {
            let all = classify(3, false, &nodes);
            assert_eq!(all.devices.len(), 1);
            assert_eq!(all.devices[0].names, ["vif3.0"]);
        }
        let all = classify(3, false, &[forged]);
        assert!(all.devices.is_empty());
        assert!(all.refused[0].reason.contains("toolstack"));
    }

    #[test]
    fn a_qdisk_says_so() {
        let all = classify(
            3,
            false,
            &[node("vbd", 768, "/local/domain/0/backend/qdisk/3/768", &[("dev", "hda"), ("params", "aio:/x.img")])],
        );
        assert_eq!(all.devices[0].param("backend-kind"), Some("qdisk"));
    }
}
