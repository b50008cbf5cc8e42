//! `remus doctor`: every prerequisite of a protection, checked and explained, on this host and on the other one.
//!
//! It asks the host itself, through [`Probe`], and not the daemon, which may be what does not start. Each check yields [`Finding`]s: what
//! was found and, unless all is well, what to do about it.

mod checks;
mod disks;
mod guest;
mod pair;
mod probe;
mod show;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use disks::DiskFacts;
pub use pair::{compare, unreachable};
pub use probe::{Output, Probe, RealProbe};
pub use show::text;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Protection works, but something will hurt one day.
    Warn,
    /// Protection, or a failover, would fail.
    Fail,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which check; stable, for programs.
    pub check: String,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
}

impl Finding {
    fn ok(check: &str, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Ok, found: found.into(), todo: None }
    }

    fn warn(check: &str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Warn, found: found.into(), todo: Some(todo.into()) }
    }

    fn fail(check: &str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(check, found, todo) }
    }
}

/// What two hosts must agree in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Xen's version, `4.17`.
    pub xen: Option<String>,
    /// The processors' features as Xen prints them.
    pub processor: Option<String>,
    /// This program's version.
    pub remus: String,
    /// Milliseconds since the Unix epoch when the report was made.
    pub time_ms: u64,
    /// Bridges.
    pub bridges: Vec<String>,
    /// Memory that Xen can give to new domains, in MiB.
    pub free_memory_mib: Option<u64>,
    /// Mirrored disks, by name.
    #[serde(default)]
    pub disks: BTreeMap<String, DiskFacts>,
}

/// What is known of one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its largest memory in MiB.
    pub memory_mib: Option<u64>,
    /// The bridges that its interfaces are on.
    pub bridges: Vec<String>,
    /// The mirrored disks that it has.
    #[serde(default)]
    pub mirrored: Vec<String>,
    /// What was found.
    pub findings: Vec<Finding>,
}

/// One host, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub host: String,
    /// What to compare with another host.
    pub facts: Facts,
    /// What was found.
    pub findings: Vec<Finding>,
    /// Its guests, or the one that was asked for.
    pub guests: Vec<Guest>,
}

impl Report {
    /// The worst that concerns the host, or a guest that was asked for by name.
    #[must_use]
    pub fn worst(&self, wanted: Option<&str>) -> Verdict {
        let guests = self.guests.iter().filter(|guest| Some(guest.name.as_str()) == wanted);
        let findings = self.findings.iter().chain(guests.flat_map(|guest| &guest.findings));
        findings.map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
    }
}

/// Checks this host, and its guests or the one of this name.
#[must_use]
pub fn examine(probe: &dyn Probe, wanted: Option<&str>) -> Report {
    let xl = checks::XlInfo::of(probe);
    let mut findings = vec![checks::privileges(probe), checks::dom0(probe)];
    findings.extend(checks::xen(probe, &xl));
    findings.extend([
        checks::helper(probe, &xl),
        checks::libraries(probe, &xl),
        checks::xenstore(probe),
        checks::modules(probe),
        checks::memory(probe),
        checks::balloon(probe, &xl),
        checks::disk(probe),
        checks::clock(probe),
        checks::bridge(probe),
        checks::link(probe),
        checks::daemon(probe),
    ]);
    let statuses = disks::statuses(probe);
    findings.extend(disks::host(probe, &statuses));
    let guests = guest::all(probe, wanted);
    if let Some(name) = wanted.filter(|_| guests.is_empty()) {
        let todo = "`xl list` shows those that run; it must run on one of the two hosts";
        findings.push(Finding::warn("guest", format!("no guest {name} runs here"), todo));
    }
    findings.extend(checks::autostart(probe, wanted));
    findings.extend(checks::xendomains(probe, wanted));
    Report {
        host: probe.read("/proc/sys/kernel/hostname").map_or_else(|| "this host".into(), |name| name.trim().into()),
        facts: Facts {
            xen: xl.version(),
            processor: xl.get("hw_caps").map(str::to_owned),
            remus: env!("CARGO_PKG_VERSION").into(),
            time_ms: probe.now_ms(),
            bridges: checks::bridges(probe),
            free_memory_mib: xl.get("free_memory").and_then(|text| text.parse().ok()),
            disks: disks::facts(&statuses),
        },
        findings,
        guests,
    }
}
