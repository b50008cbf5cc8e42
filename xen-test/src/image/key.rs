//! What an image is made of, and the name under which the cache keeps it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::progress;

/// apt sources of the nested dom0.
pub const SOURCES: &str = "\
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
";

/// Installed by mmdebstrap.
pub const PACKAGES: [&str; 32] = [
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
    "xen-utils-common",
    "xenstore-utils",
    "qemu-system-xen",
    "openssh-server",
    "openssh-client",
    "iproute2",
    "bridge-utils",
    "iputils-ping",
    "iputils-arping",
    "iptables",
    "nftables",
    "ethtool",
    "tcpdump",
    "socat",
    "python3",
    "kmod",
    "procps",
    "psmisc",
    "util-linux",
    "busybox-static",
    "strace",
    "gdb-minimal",
    "lsof",
    "jq",
    "rsync",
    "nbd-client",
    "dmsetup",
    "drbd-utils",
    "e2fsprogs",
    "bash-completion",
];

/// Unpacked, not installed: its maintainer scripts would build an initramfs that nobody uses.
pub const KERNEL: &str = "linux-image-amd64";

/// How long a resolution of package versions is taken as current.
const RESOLUTION_AGE: Duration = Duration::from_secs(24 * 3600);

/// The exact packages an image is built from.
#[derive(Debug, Clone)]
pub struct Resolution {
    /// `name version` lines, sorted.
    pub text: String,
    /// Name of the versioned kernel package, such as `linux-image-6.1.0-56-amd64`.
    pub kernel: String,
}

/// Package versions current at the mirror. Asked at most once a day; without a network the last
/// answer is used.
pub fn resolve(cache: &Path) -> Result<Resolution> {
    let wanted = PACKAGES.iter().chain([&KERNEL]).copied().collect::<Vec<_>>().join(" ");
    let file = cache.join(format!("resolved-{}", short_hash([wanted.as_bytes()])));
    let age = std::fs::metadata(&file)
        .and_then(|meta| meta.modified())
        .ok()
        .map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
    if age.is_some_and(|age| age < RESOLUTION_AGE) {
        return parse(&std::fs::read_to_string(&file)?);
    }
    match ask_apt(cache) {
        Ok(text) => {
            let resolution = parse(&text)?;
            let part = file.with_extension("part");
            std::fs::write(&part, &text)?;
            std::fs::rename(&part, &file)?;
            Ok(resolution)
        }
        Err(error) if age.is_some() => {
            progress!("{error:#}; using the package versions known from last time");
            parse(&std::fs::read_to_string(&file)?)
        }
        Err(error) => Err(error),
    }
}

fn ask_apt(cache: &Path) -> Result<String> {
    progress!("asking the Debian mirror for package versions");
    let apt = cache.join("apt");
    for dir in ["state/lists/partial", "cache/archives/partial"] {
        std::fs::create_dir_all(apt.join(dir))?;
    }
    std::fs::write(apt.join("sources.list"), SOURCES)?;
    std::fs::write(apt.join("status"), "")?;
    let command = || {
        let mut command = Command::new("apt-get");
        for (name, value) in [
            ("Dir::Etc::sourcelist", apt.join("sources.list")),
            ("Dir::State", apt.join("state")),
            ("Dir::State::status", apt.join("status")),
            ("Dir::Cache", apt.join("cache")),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Acquire::Languages", "none".into()),
            ("APT::Architecture", "amd64".into()),
            ("APT::Install-Recommends", "false".into()),
        ] {
            command.arg("-o").arg(format!("{name}={}", value.display()));
        }
        command.stdin(std::process::Stdio::null()).env("LC_ALL", "C");
        command
    };
    let update = command().args(["-q", "update"]).output().context("cannot run apt-get")?;
    if !update.status.success() {
        bail!("apt-get update failed: {}", String::from_utf8_lossy(&update.stderr).trim());
    }
    let plan =
        command().args(["-s", "-q", "install"]).args(PACKAGES).arg(KERNEL).output().context("cannot run apt-get")?;
    if !plan.status.success() {
        bail!("apt-get cannot resolve: {}", String::from_utf8_lossy(&plan.stderr).trim());
    }
    let plan = String::from_utf8_lossy(&plan.stdout);
    // "Inst NAME (VERSION Origin... [arch])"
    let mut lines: Vec<String> = plan
        .lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|line| {
            let (name, rest) = line.split_once(" (")?;
            Some(format!("{name} {}", rest.split_whitespace().next()?))
        })
        .collect();
    lines.sort();
    Ok(lines.join("\n") + "\n")
}

fn parse(text: &str) -> Result<Resolution> {
    let kernel = text
        .lines()
        .filter_map(|line| line.split(' ').next())
        .find(|name| name.starts_with("linux-image-") && *name != KERNEL)
        .context("apt named no kernel package: delete the cache directory and try again")?;
    Ok(Resolution { text: text.to_owned(), kernel: kernel.to_owned() })
}

/// 16 hexadecimal digits over the parts and their lengths.
pub fn short_hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    format!("{:016x}", hasher.digest())
}
