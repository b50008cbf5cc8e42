//! What two hosts must agree in.

use super::{Finding, Report, disks};

/// Clocks may differ by this much, in milliseconds, besides what asking took.
const CLOCKS: u64 = 100;

/// The other host could not be asked.
#[must_use]
pub fn unreachable(host: &str, why: &str) -> Finding {
    Finding::fail(
        "peer",
        format!("{host} cannot be asked: {why}"),
        format!(
            "`ssh root@{host} remus doctor` must work without a password, and remusd be installed there; with `remus pair` ssh is needed \
             for this check only"
        ),
    )
}

fn version(text: &str) -> Vec<u32> {
    text.split('.').filter_map(|part| part.parse().ok()).collect()
}

/// Compares this host with the one that is to be its backup. `asked_ms`: when it was asked, and when it had answered, by this host's clock.
#[must_use]
pub fn compare(here: &Report, there: &Report, asked_ms: (u64, u64), wanted: Option<&str>) -> Vec<Finding> {
    let mut findings = vec![xen(here, there), processors(here, there), programs(here, there), clocks(there, asked_ms)];
    for guest in here.guests.iter().filter(|guest| wanted.is_none_or(|name| name == guest.name)) {
        findings.extend(disks::compare(here, there, guest));
        let missing: Vec<_> = guest.bridges.iter().filter(|b| !there.facts.bridges.contains(b)).cloned().collect();
        if !missing.is_empty() {
            findings.push(Finding::fail(
                "peer-bridge",
                format!("{} is on {}, which {} does not have", guest.name, missing.join(", "), there.host),
                "make a bridge of the same name there, on the same network",
            ));
        }
        if let (Some(needs), Some(free)) = (guest.memory_mib, there.facts.free_memory_mib)
            && needs > free
        {
            findings.push(Finding::fail(
                "peer-memory",
                format!("{} needs {needs} MiB, {} has {free} MiB free", guest.name, there.host),
                "free memory there, or give its dom0 less (dom0_mem=)",
            ));
        }
    }
    findings
}

fn xen(here: &Report, there: &Report) -> Finding {
    let (Some(ours), Some(theirs)) = (&here.facts.xen, &there.facts.xen) else {
        return Finding::fail("peer-xen", "not known on both hosts", "see xen on each");
    };
    match version(ours).cmp(&version(theirs)) {
        std::cmp::Ordering::Equal => Finding::ok("peer-xen", format!("both have Xen {ours}")),
        std::cmp::Ordering::Less => Finding::warn(
            "peer-xen",
            format!("{ours} here, {theirs} there"),
            "a guest goes to a newer Xen but not back: update this host too",
        ),
        std::cmp::Ordering::Greater => Finding::fail(
            "peer-xen",
            format!("{ours} here, {theirs} there"),
            "an older Xen does not take a newer one's guests: update the other host first",
        ),
    }
}

fn processors(here: &Report, there: &Report) -> Finding {
    match here.facts.processor == there.facts.processor {
        true => Finding::ok("peer-processor", "the same features"),
        false => Finding::warn(
            "peer-processor",
            "the features differ",
            "a guest that uses what the other host lacks dies there: mask it (xl.cfg: cpuid=) when the guest is made",
        ),
    }
}

fn programs(here: &Report, there: &Report) -> Finding {
    let (ours, theirs) = (&here.facts.remus, &there.facts.remus);
    match ours == theirs {
        true => Finding::ok("peer-remusd", format!("both have remusd {ours}")),
        false => {
            Finding::warn("peer-remusd", format!("{ours} here, {theirs} there"), "use the same version on both hosts")
        }
    }
}

fn clocks(there: &Report, (asked, answered): (u64, u64)) -> Finding {
    let theirs = there.facts.time_ms;
    let off = if theirs < asked { asked - theirs } else { theirs.saturating_sub(answered) };
    match off {
        0..=CLOCKS => Finding::ok("peer-clock", "the clocks agree"),
        _ => Finding::warn(
            "peer-clock",
            format!("the clocks differ by at least {off} ms"),
            "the guest's time would jump at a failover: synchronize both hosts",
        ),
    }
}
