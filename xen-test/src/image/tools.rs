//! The programs the harness itself runs, and their Debian packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress;

/// Program → Debian package that brings it.
const TOOLS: [(&str, &str); 11] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("ip", "iproute2"),
    ("ping", "iputils-ping"),
    ("ssh", "openssh-client"),
    ("depmod", "kmod"),
    ("setpriv", "util-linux"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
];

/// Installs with apt whatever the harness needs and this machine lacks. Says what it installs.
///
/// # Errors
/// Not root, or apt-get failed; the message holds the command to run by hand.
pub fn ensure_tools() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("xen-test needs root (network namespaces, taps, images): run it with sudo");
    }
    let missing: Vec<&str> =
        TOOLS.iter().filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress!("installing with apt: {}", missing.join(" "));
    let install = || {
        Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(std::process::Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .context("cannot run apt-get: is this Debian?")
    };
    if !install()?.success() {
        progress!("apt-get install failed; once more after apt-get update");
        Command::new("apt-get").args(["update", "-q"]).stdout(std::io::stderr()).status()?;
        if !install()?.success() {
            bail!("apt-get could not install: run `apt-get install {}` by hand", missing.join(" "));
        }
    }
    Ok(())
}

/// The first match for `program` on PATH or in the sbin directories.
pub fn find_program(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/bin"])
        .filter(|dir| !dir.is_empty())
        .map(|dir| Path::new(dir).join(program))
        .find(|file| file.is_file())
}
