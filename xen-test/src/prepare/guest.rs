//! The test guest: its initramfs and its xl configurations.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xen_test_guest::xl::{HVM_CFG, PVH_CFG};

use super::{cargo, target_dir};
use crate::image::Image;
use crate::image::cpio::Archive;
use crate::image::modules::ModuleTree;

/// Target that makes cargo apply the static-linking flag to the guest alone.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Kernel modules of the guest; everything else it needs is built in.
const MODULES: [&str; 2] = ["xen-netfront", "xen-blkfront"];
/// Those of its ledger's file system, loaded when one is opened.
const FILE_SYSTEM: [&str; 2] = ["crc32c_generic", "ext4"];

/// Builds the guest's program and writes `initrd.gz`, `pvh.cfg` and `hvm.cfg` below `dir`. The
/// kernel is in the image already, beside where these go.
pub fn files(image: &Image, dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(dir)?;
    let initrd = dir.join("initrd.gz");
    std::fs::write(&initrd, initramfs(image, &program()?)?)?;
    let mut files = vec![initrd];
    for (name, text) in [("pvh.cfg", PVH_CFG), ("hvm.cfg", HVM_CFG)] {
        let file = dir.join(name);
        std::fs::write(&file, with_unpacked_kernel(text))?;
        files.push(file);
    }
    Ok(files)
}

/// A PVH configuration that names the unpacked kernel of the image: xl takes seconds, under
/// emulation, to unpack the other one. An HVM guest's loader needs the packed one.
fn with_unpacked_kernel(text: &str) -> String {
    if text.lines().any(|line| line == "type = \"pvh\"") {
        text.replace("/opt/guest/vmlinuz", "/opt/guest/vmlinux")
    } else {
        text.to_owned()
    }
}

/// Builds the static init and returns its path.
fn program() -> Result<PathBuf> {
    crate::progress!("building the test guest's init");
    let dir = target_dir()?.join("guest");
    cargo(|command| {
        command
            .args(["build", "-q", "--release", "-p", "xen-test-guest", "--target", TARGET])
            .arg("--target-dir")
            .arg(&dir)
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_TARGET_DIR");
    })?;
    Ok(dir.join(TARGET).join("release/xen-test-guest"))
}

fn initramfs(image: &Image, program: &Path) -> Result<Vec<u8>> {
    let program = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let mut archive = Archive::new();
    archive.file("init", 0o755, &program);
    for dir in ["dev", "proc", "sys", "sbin"] {
        archive.directory(dir);
    }
    archive.char_device("dev/console", 0o600, 5, 1);
    let tree = ModuleTree::read(&image.modules())?;
    for (list, modules) in [("order", MODULES), ("ext4", FILE_SYSTEM)] {
        let mut order = String::new();
        for path in tree.in_order(&modules)? {
            let file = image.modules().join(&path);
            let name = file.file_name().context("a module has a name")?.to_string_lossy().into_owned();
            archive.file(&format!("modules/{name}"), 0o644, &std::fs::read(&file)?);
            order.push_str(&format!("{name}\n"));
        }
        archive.file(&format!("modules/{list}"), 0o644, order.as_bytes());
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pvh_guest_gets_the_unpacked_kernel() {
        assert!(with_unpacked_kernel(PVH_CFG).contains("kernel = \"/opt/guest/vmlinux\""));
        assert_eq!(with_unpacked_kernel(HVM_CFG), HVM_CFG);
        assert!(HVM_CFG.contains("kernel = \"/opt/guest/vmlinuz\""));
    }
}
