//! The checks of a guest: its type, firmware and devices, from what xl knows of it.

use serde_json::Value;

use super::{Finding, Guest, Probe, disks};
use crate::protect::domain::DomainConfig;

/// The guests that run here, or the one of this name.
pub(super) fn all(probe: &dyn Probe, wanted: Option<&str>) -> Vec<Guest> {
    let Some(output) = probe.run("xl", &["list", "-l"]).filter(|output| output.ok) else { return Vec::new() };
    let listing: Value = serde_json::from_str(&output.out).unwrap_or_default();
    let entries = listing.as_array().cloned().unwrap_or_default();
    let guests = entries.iter().filter(|entry| entry.get("domid").and_then(Value::as_u64) != Some(0));
    let guests = guests.filter_map(|entry| guest(entry.get("config")?));
    guests.filter(|guest| wanted.is_none_or(|name| guest.name == name)).collect()
}

fn list<'a>(config: &'a Value, key: &str) -> &'a [Value] {
    config.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn guest(config: &Value) -> Option<Guest> {
    let name = config.pointer("/c_info/name")?.as_str()?.to_owned();
    let known = DomainConfig::parse(config.to_string()).ok()?;
    let memory = |key: &str| config.pointer(&format!("/b_info/{key}")).and_then(Value::as_u64);
    let mut findings = vec![kind(&known, config)];
    findings.push(match known.unsupported() {
        none if none.is_empty() => Finding::ok("devices", "all can be checkpointed"),
        some => Finding::fail("devices", some.join(", "), "their state cannot be checkpointed: take them away first"),
    });
    let backends = ["nics", "disks"].iter().flat_map(|key| list(config, key));
    let foreign: Vec<_> = backends.map(|device| text(device, "backend_domname")).filter(|b| !b.is_empty()).collect();
    if !foreign.is_empty() {
        let todo = "only devices whose backend is dom0 can be held back and copied";
        findings.push(Finding::fail("backends", format!("in driver domains: {}", foreign.join(", ")), todo));
    }
    let (finding, mirrored) = disks(config);
    findings.push(finding);
    if let (Some(max), Some(target)) = (memory("max_memkb"), memory("target_memkb"))
        && max != target
    {
        findings.push(Finding::warn(
            "ballooning",
            format!("memory {} MiB of at most {} MiB", target / 1024, max / 1024),
            "the copy needs all of it, and pages that come and go cost epochs: set memory = maxmem",
        ));
    }
    let mut bridges: Vec<_> = list(config, "nics").iter().map(|nic| text(nic, "bridge").to_owned()).collect();
    bridges.retain(|bridge| !bridge.is_empty());
    bridges.sort();
    bridges.dedup();
    Some(Guest { name, memory_mib: memory("max_memkb").map(|kib| kib / 1024), bridges, mirrored, findings })
}

fn kind(known: &DomainConfig, config: &Value) -> Finding {
    match known.guest_type() {
        "pvh" => Finding::ok("type", "PVH"),
        "hvm" => {
            let firmware = config.pointer("/b_info/type.hvm/bios").or_else(|| config.pointer("/b_info/u/hvm/bios"));
            let firmware = firmware.and_then(Value::as_str).unwrap_or("seabios");
            let stub = config.pointer("/b_info/device_model_stubdomain");
            if stub.is_some_and(|v| v == "True" || v == true) {
                let todo = "its QEMU cannot be asked for its state there: device_model_stubdomain_override = 0";
                return Finding::fail("type", "HVM with a stub domain", todo);
            }
            match firmware {
                "ovmf" => Finding::warn(
                    "type",
                    "HVM, firmware OVMF",
                    "changes of its UEFI variables that are only in the firmware's flash are not replicated",
                ),
                other => Finding::ok("type", format!("HVM, firmware {other}")),
            }
        }
        _ => Finding::fail(
            "type",
            "PV",
            "writes of a PV guest can be logged only by a hypervisor with shadow paging, which Debian's lacks: make it type = \"pvh\"",
        ),
    }
}

/// What becomes of the disks that it writes to, and those of them that are on the mirror.
fn disks(config: &Value) -> (Finding, Vec<String>) {
    let writable = list(config, "disks").iter().filter(|disk| {
        let truth = |key: &str| disk.get(key).is_some_and(|v| v == true || v == 1 || v == "True");
        truth("readwrite") && !truth("is_cdrom")
    });
    let (mut mirrored, mut cached, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for disk in writable {
        match disks::name_of(disk) {
            Some(name) if disks::cached(disk) => cached.push(name),
            Some(name) => mirrored.push(name),
            None => others.push(text(disk, "vdev")),
        }
    }
    let finding = if !cached.is_empty() {
        Finding::fail(
            "disks",
            format!("on the mirror, but not as phy: {}", cached.join(", ")),
            "dom0's page cache is between the guest and the mirror: write phy:/dev/remus/NAME in its configuration",
        )
    } else if !others.is_empty() {
        Finding::warn(
            "disks",
            format!("written to, and not on the mirror: {}", others.join(", ")),
            "`remus disk create` sets a mirrored disk up; `--disk VDEV=script:PROGRAM` gives one to a program; --unsafe disk:VDEV lets it \
             pass (shared storage alone does not do: it would be ahead of the copy's memory)",
        )
    } else if mirrored.is_empty() {
        Finding::ok("disks", "none that is written to")
    } else {
        Finding::ok("disks", format!("on the mirror: {}", mirrored.join(", ")))
    };
    (finding, mirrored)
}
