//! The checks of mirrored disks (docs/disks.md): their services on this host, and what both hosts have to agree in.

use std::collections::BTreeMap;

use devices::mirror::client::LINKS;
use devices::mirror::service::Status;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checks::has_module;
use super::{Finding, Guest, Probe, Report};

/// Where each has its configuration.
const CONFIG: &str = "/etc/remus/disk";
/// Where blkback says whether it keeps guests' pages mapped.
const PERSISTENT: &str = "/sys/module/xen_blkback/parameters/feature_persistent";

/// What is known of a mirrored disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// Bytes; absent if its service does not answer.
    pub size: Option<u64>,
    /// Of a block, in bytes.
    pub block: u32,
    /// `none`, `source` or `target`.
    pub role: String,
}

/// What each disk's service says, or why it does not.
pub(super) fn statuses(probe: &dyn Probe) -> BTreeMap<String, Result<Status, String>> {
    let files = probe.list(CONFIG);
    let names = files.iter().filter_map(|file| file.strip_suffix(".env"));
    let ask = |name: &str| match probe.run("remus-disk", &["ctl", name, "status"]) {
        None => Err("there is no remus-disk".to_owned()),
        Some(output) if !output.ok => {
            Err(output.err.trim().lines().next_back().unwrap_or("it says nothing").to_owned())
        }
        Some(output) => serde_json::from_str(&output.out).map_err(|error| error.to_string()),
    };
    names.map(|name| (name.to_owned(), ask(name))).collect()
}

pub(super) fn facts(statuses: &BTreeMap<String, Result<Status, String>>) -> BTreeMap<String, DiskFacts> {
    let fact = |status: &Result<Status, String>| match status {
        Ok(status) => DiskFacts { size: Some(status.size), block: status.block, role: status.role.clone() },
        Err(_) => DiskFacts::default(),
    };
    statuses.iter().map(|(name, status)| (name.clone(), fact(status))).collect()
}

/// Of this host. Nothing, where no disk is set up.
pub(super) fn host(probe: &dyn Probe, statuses: &BTreeMap<String, Result<Status, String>>) -> Vec<Finding> {
    if statuses.is_empty() {
        return Vec::new();
    }
    let mut findings = vec![module(probe), persistent(probe)];
    findings.extend(statuses.iter().map(|(name, status)| match status {
        Ok(status) => disk(name, status),
        Err(why) => Finding::fail(
            "mirrored-disk",
            format!("{name}: its service does not answer: {why}"),
            format!("systemctl enable --now remus-disk@{name}; systemctl status remus-disk@{name} says why it ends"),
        ),
    }));
    findings
}

fn module(probe: &dyn Probe) -> Finding {
    match has_module(probe, "nbd") {
        true => Finding::ok("nbd", "the kernel's NBD client is there"),
        false => Finding::fail(
            "nbd",
            "the kernel has no module nbd",
            "a mirrored disk reaches guests through it: use the distribution's full kernel (not a cloud kernel)",
        ),
    }
}

fn persistent(probe: &dyn Probe) -> Finding {
    let todo = "with persistent grants dom0 writes into a guest's pages behind the log of dirty pages, and the audit finds differences: \
                `options xen-blkback feature_persistent=0` in /etc/modprobe.d/remus.conf, and attach the guest's disks anew";
    match probe.read(PERSISTENT).as_deref().map(str::trim) {
        Some("N" | "0") => Finding::ok("blkback", "keeps no page of a guest mapped"),
        Some(_) => Finding::warn("blkback", "feature_persistent is on", todo),
        None => {
            let files = probe.list("/etc/modprobe.d");
            let texts = files.iter().filter_map(|file| probe.read(&format!("/etc/modprobe.d/{file}")));
            let off = |text: &str| {
                text.lines().map(str::trim).any(|line| {
                    let line = line.replace("xen_blkback", "xen-blkback");
                    line.starts_with("options xen-blkback") && line.contains("feature_persistent=0")
                })
            };
            match texts.into_iter().any(|text| off(&text)) {
                true => Finding::ok("blkback", "will keep no page of a guest mapped, once it is loaded"),
                false => Finding::warn("blkback", "is not loaded, and feature_persistent will be on when it is", todo),
            }
        }
    }
}

fn disk(name: &str, status: &Status) -> Finding {
    let warn = |found: String, todo: String| Finding::warn("mirrored-disk", format!("{name}: {found}"), todo);
    let fail = |found: String, todo: String| Finding::fail("mirrored-disk", format!("{name}: {found}"), todo);
    let mib = |bytes: u64| bytes >> 20;
    match (status.role.as_str(), &status.target) {
        ("source", _) if status.sync_stuck.is_some() => fail(
            format!("cannot be read at byte {}, so its copy cannot be completed", status.sync_stuck.unwrap_or_default()),
            "the device below it is failing: replace it, or write that place anew".into(),
        ),
        ("source", _) if !status.open => warn(
            "source, and closed".into(),
            format!("no guest can use it here: `remus disk attach {name}` opens it if it is this host's; `remus disk demote {name}` if not"),
        ),
        ("source", _) if !status.connected && status.via.is_some() => fail(
            format!("no copy is reached; {} MiB are marked", mib(status.marked)),
            format!("`systemctl status remus-disk@{name}` on the other host, and the command that leads there: {}", status.via.clone().unwrap_or_default()),
        ),
        ("source", _) if status.connected && !status.in_sync => warn(
            format!("its copy is being synchronised, {} MiB to go", mib(status.sync_left)),
            "until then the guest is not protected; `remus jobs` shows how far it is".into(),
        ),
        ("source", _) if status.connected => Finding::ok("mirrored-disk", format!("{name}: source, its copy is alike")),
        ("source", _) => Finding::ok("mirrored-disk", format!("{name}: source; a protection looks for its copy")),
        ("target", _) if !status.good => warn(
            "copy, not known to be good".into(),
            "it cannot be activated before it is synchronised: protect the guest from the other host, and wait until it is".into(),
        ),
        ("target", _) => Finding::ok("mirrored-disk", format!("{name}: copy, good")),
        _ => warn(
            "neither source nor copy".into(),
            format!("`remus disk attach {name}` on the host that has the contents, `remus disk demote {name}` on the other"),
        ),
    }
}

/// The mirrored disk that a disk of a guest's configuration is.
pub(super) fn name_of(disk: &Value) -> Option<String> {
    let target = disk.get("pdev_path")?.as_str()?;
    devices::mirror::standby::name_of(LINKS.as_ref(), target)
}

/// Of a guest's disks, those on the mirror that dom0's page cache is in front of (hazard F12a).
pub(super) fn cached(disk: &Value) -> bool {
    // libxl's JSON leaves the backend out while it is not chosen.
    disk.get("backend").and_then(Value::as_str).is_some_and(|backend| backend != "phy" && backend != "unknown")
}

/// What both hosts have to agree in for a guest's disks.
pub(super) fn compare(here: &Report, there: &Report, guest: &Guest) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in &guest.mirrored {
        let Some(ours) = here.facts.disks.get(name) else {
            continue;
        };
        let fail = |found: String, todo: String| Finding::fail("peer-disk", format!("{name}: {found}"), todo);
        let host = &there.host;
        findings.push(match there.facts.disks.get(name) {
            None => fail(
                format!("is not set up on {host}"),
                format!(
                    "there: `remus disk create {name} DEVICE --nbd N`, DEVICE being of the same size; it is OVERWRITTEN"
                ),
            ),
            Some(theirs) => match (ours.size, theirs.size) {
                (_, None) => {
                    fail(format!("its service does not answer on {host}"), format!("see mirrored-disk on {host}"))
                }
                (Some(here), Some(there)) if here != there => fail(
                    format!("{here} bytes here, {there} bytes on {host}"),
                    "both hosts' devices must have the same size: make them alike, and create the copy's anew".into(),
                ),
                _ if ours.block != theirs.block => fail(
                    format!("blocks of {} bytes here, of {} bytes on {host}", ours.block, theirs.block),
                    "a guest that goes on there would find another disk: use devices of the same block size".into(),
                ),
                _ if ours.role == "source" && theirs.role == "source" => fail(
                    format!("is the source on both hosts; {host}'s contents may be what counts"),
                    format!("on the host whose contents do NOT count: `remus disk demote {name}`"),
                ),
                (_, Some(size)) => Finding::ok("peer-disk", format!("{name}: {} MiB on both hosts", size >> 20)),
            },
        });
    }
    findings
}
