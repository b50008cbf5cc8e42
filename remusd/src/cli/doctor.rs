//! `remus doctor`: looks at this host itself, has the other one look at itself over ssh, and compares.

use std::process::Command;

use super::args::Doctor;
use super::render::Paint;
use crate::doctor::{Finding, Probe, RealProbe, Report, Verdict, compare, examine, text, unreachable};
use crate::link::transport::DEFAULT_SSH;

/// Something that protection needs is missing; as for [`crate::api::ErrorCode::Unsupported`].
const UNSUPPORTED: u8 = 6;

/// What `--json` prints.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Printed {
    hosts: Vec<Report>,
    between: Vec<Finding>,
    ok: bool,
}

/// Checks and shows; returns the exit code.
pub(super) fn doctor(doctor: &Doctor, json: bool) -> u8 {
    let guest = doctor.guest.as_deref();
    let here = examine(&RealProbe, guest);
    let mut between = Vec::new();
    let mut hosts = vec![here];
    if let Some(host) = &doctor.host {
        let asked = RealProbe.now_ms();
        match ask(doctor, host) {
            Ok(mut there) => {
                let answered = RealProbe.now_ms();
                // It runs on one of the two.
                there.findings.retain(|finding| finding.check != "guest");
                between = compare(&hosts[0], &there, (asked, answered), guest);
                hosts.push(there);
            }
            Err(why) => between.push(unreachable(host, &why)),
        }
    }
    let worst = hosts.iter().map(|report| report.worst(guest)).chain(between.iter().map(|f| f.verdict)).max();
    let ok = worst.is_none_or(|verdict| verdict < Verdict::Fail);
    if json {
        println!("{}", serde_json::to_string(&Printed { hosts, between, ok }).unwrap_or_default());
    } else {
        println!("{}", text(&hosts, &between, Paint::of_stdout()));
        let last = match (ok, doctor.host.is_some()) {
            (true, true) => "Protection can work between them.",
            (true, false) => "This host is ready. `remus doctor HOST` looks at the other one too.",
            (false, _) => "Protection would fail: see what is marked FAIL.",
        };
        println!("{last}");
    }
    if ok { 0 } else { UNSUPPORTED }
}

/// Has the other host look at itself.
fn ask(doctor: &Doctor, host: &str) -> Result<Report, String> {
    if host.starts_with('-') {
        return Err("that is not a host".into());
    }
    let ssh = doctor.ssh.as_deref().unwrap_or(DEFAULT_SSH);
    let mut remote = "remus doctor --json".to_owned();
    if let Some(guest) = &doctor.guest {
        // For a shell there.
        remote += &format!(" --guest '{}'", guest.replace('\'', r"'\''"));
    }
    // The host is an argument of the shell, not part of its program.
    let output = Command::new("sh")
        .args(["-c", &format!("exec {ssh} \"$1\" \"$2\""), "sh", host, &remote])
        .output()
        .map_err(|error| format!("{ssh}: {error}"))?;
    // It exits with a code of its own when something is missing there: what it says counts.
    match serde_json::from_slice::<Printed>(&output.stdout) {
        Ok(printed) => printed.hosts.into_iter().next().ok_or_else(|| "it reports about no host".to_owned()),
        Err(error) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim();
            Err(if said.is_empty() { format!("its answer cannot be read: {error}") } else { said.to_owned() })
        }
    }
}
