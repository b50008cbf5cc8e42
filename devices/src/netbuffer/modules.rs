//! The kernel's modules.

use std::path::Path;
use std::process::{Command, Stdio};

/// Loads what is needed and not there; to be called early by a program that gives up the right to load modules. Blocks for modprobe. Failures are left for the kernel's answer to a request to tell, since a
/// kernel may have a feature built in, or no `modprobe`.
pub fn load() {
    // By itself the module makes two devices that nobody asked for.
    modprobe("ifb", &["numifbs=0"]);
    for module in ["sch_plug", "sch_ingress", "cls_matchall", "act_mirred", "act_gact"] {
        modprobe(module, &[]);
    }
}

fn modprobe(module: &str, arguments: &[&str]) {
    if Path::new("/sys/module").join(module).exists() {
        return;
    }
    let result = Command::new("modprobe")
        .arg("-q")
        .arg(module)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match result {
        Ok(status) if status.success() => tracing::debug!(module, "loaded"),
        Ok(status) => tracing::debug!(module, %status, "modprobe failed"),
        Err(error) => tracing::debug!(module, %error, "no modprobe"),
    }
}
