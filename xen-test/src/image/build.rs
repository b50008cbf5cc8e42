//! Building an image: mmdebstrap, our overlay, an ext4 file and a small initramfs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::key::{PACKAGES, Resolution, SOURCES};
use super::modules::ModuleTree;
use super::{OVERLAY, OverlayFile};
use crate::progress;

/// What the dom0 needs to reach its root disk.
const INITRAMFS_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// Trees of the kernel package that no nested dom0 uses; without them the image is a third.
const UNUSED_MODULES: [&str; 14] = [
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/infiniband",
    "drivers/net/wireless",
    "drivers/net/ethernet",
    "drivers/iio",
    "drivers/staging",
    "drivers/usb",
    "drivers/hid",
    "drivers/input",
    "drivers/isdn",
    "drivers/hwmon",
    "drivers/scsi",
];

/// Builds into `out`, an empty directory. Slow: one to three minutes, needs the network.
pub fn build(out: &Path, resolution: &Resolution) -> Result<()> {
    let root = out.join("root");
    bootstrap(&root)?;
    let version = unpack_kernel(&root, out, resolution)?;
    progress!("adding keys and configuration");
    make_keys(&root, out)?;
    for file in OVERLAY {
        install(&root, file)?;
    }
    for entry in std::fs::read_dir(root.join("boot"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("xen-4.17") && name.ends_with(".gz") {
            run(Command::new("sh")
                .arg("-c")
                .arg("exec gzip -dc \"$1\" >\"$2\"")
                .arg("sh")
                .arg(entry.path())
                .arg(out.join("xen.elf")))?;
        }
    }
    if !out.join("xen.elf").exists() {
        bail!("the hypervisor package brought no /boot/xen-4.17*.gz");
    }
    initramfs(&root, out, &version)?;
    progress!("writing the root file system");
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^metadata_csum", "-J", "size=16", "-m", "0", "-d"])
        .arg(&root)
        .arg(out.join("root.img"))
        .arg("4G"))?;
    std::fs::remove_dir_all(&root).context("cannot remove the unpacked root")?;
    std::fs::write(out.join("packages"), &resolution.text)?;
    Ok(())
}

fn bootstrap(root: &Path) -> Result<()> {
    progress!("mmdebstrap: bookworm with Xen 4.17 (about a minute)");
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase", "--format=directory"]);
    command.arg("--aptopt=Acquire::Languages \"none\"");
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for path in ["doc", "man", "locale", "info"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{path}/*"));
    }
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.arg("bookworm").arg(root).args(SOURCES.lines());
    run(&mut command)
}

/// Unpacks the kernel package beside the root and moves the modules in. Returns the version.
fn unpack_kernel(root: &Path, out: &Path, resolution: &Resolution) -> Result<String> {
    progress!("fetching {}", resolution.kernel);
    // The bootstrapped tree has no package lists left; its own apt fetches them again.
    let work = out.join("kernel");
    std::fs::create_dir_all(&work)?;
    run(Command::new("chroot").arg(root).args(["sh", "-c"]).arg(format!(
        "cd /tmp && apt-get -q update >/dev/null && apt-get -q download {} && apt-get clean && \
         rm -rf /var/lib/apt/lists/*",
        resolution.kernel
    )))?;
    let deb = std::fs::read_dir(root.join("tmp"))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no kernel package")?;
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&work))?;
    std::fs::remove_file(&deb)?;
    let version = resolution.kernel.trim_start_matches("linux-image-").to_owned();
    let modules = work.join("lib/modules").join(&version);
    for tree in UNUSED_MODULES {
        let _ = std::fs::remove_dir_all(modules.join("kernel").join(tree));
    }
    std::fs::create_dir_all(root.join("usr/lib/modules"))?;
    run(Command::new("cp").arg("-a").arg(&modules).arg(root.join("usr/lib/modules").join(&version)))?;
    run(Command::new("depmod").arg("-b").arg(root).arg(&version))?;
    let kernel = work.join("boot").join(format!("vmlinuz-{version}"));
    std::fs::copy(&kernel, out.join("vmlinuz")).context("the kernel package has no vmlinuz")?;
    std::fs::create_dir_all(root.join("opt/guest"))?;
    std::fs::copy(&kernel, root.join("opt/guest/vmlinuz"))?;
    unpack_payload(root)?;
    std::fs::remove_dir_all(&work)?;
    // The guest's initramfs is packed later, from these.
    run(Command::new("cp").arg("-a").arg(root.join("usr/lib/modules").join(&version)).arg(out.join("modules")))?;
    std::fs::write(out.join("kernel-version"), &version)?;
    Ok(version)
}

/// Writes `/opt/guest/vmlinux`, the ELF file inside the guest's kernel: without it every `xl create`
/// of a PVH guest unpacks the kernel anew, which takes seconds under emulation.
///
/// Format: Documentation/arch/x86/boot.rst of the kernel, fields `setup_sects`, `payload_offset`
/// and `payload_length`; the payload ends with its unpacked length in 4 bytes.
fn unpack_payload(root: &Path) -> Result<()> {
    const UNPACK: &str = "\
import lzma, struct
image = open('/opt/guest/vmlinuz', 'rb').read()
start = (image[0x1f1] + 1) * 512 + struct.unpack_from('<I', image, 0x248)[0]
payload = image[start:start + struct.unpack_from('<I', image, 0x24c)[0] - 4]
open('/opt/guest/vmlinux', 'wb').write(lzma.decompress(payload))
";
    run(Command::new("chroot").arg(root).args(["python3", "-c", UNPACK]))
        .context("the kernel's payload is not as expected (xz)")
}

/// One key pair for people (harness, hosta and hostb alike) and one for both ssh servers.
fn make_keys(root: &Path, out: &Path) -> Result<()> {
    let ssh = root.join("root/.ssh");
    std::fs::create_dir_all(&ssh)?;
    std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o700))?;
    for entry in std::fs::read_dir(root.join("etc/ssh"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            std::fs::remove_file(entry.path())?;
        }
    }
    let keygen = |path: &Path, comment: &str| {
        run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"]).arg(path))
    };
    let user = ssh.join("id_ed25519");
    keygen(&user, "xen-test")?;
    std::fs::copy(user.with_extension("pub"), ssh.join("authorized_keys"))?;
    std::fs::copy(&user, out.join("id_ed25519"))?;
    let host = root.join("etc/ssh/ssh_host_ed25519_key");
    keygen(&host, "xen-test-host")?;
    let public = std::fs::read_to_string(host.with_extension("pub"))?;
    let line = format!("hosta,hostb,10.77.0.*,10.78.0.*,fd77::* {}\n", public.trim());
    std::fs::write(root.join("etc/ssh/ssh_known_hosts"), &line)?;
    std::fs::write(out.join("known_hosts"), &line)?;
    Ok(())
}

fn install(root: &Path, file: &OverlayFile) -> Result<()> {
    let path = root.join(file.path);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // mmdebstrap may have left a link (such as /etc/resolv.conf) that leads out of the tree.
    if path.is_symlink() {
        std::fs::remove_file(&path)?;
    }
    std::fs::write(&path, file.text)?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(file.mode))?;
    Ok(())
}

fn initramfs(root: &Path, out: &Path, version: &str) -> Result<()> {
    let modules = root.join("usr/lib/modules").join(version);
    let mut archive = Archive::new();
    let busybox = std::fs::read(root.join("usr/bin/busybox"))
        .or_else(|_| std::fs::read(root.join("bin/busybox")))
        .context("the image has no busybox")?;
    archive.file("bin/busybox", 0o755, &busybox);
    archive.file("init", 0o755, include_bytes!("overlay/initramfs-init"));
    archive.directory("dev");
    archive.char_device("dev/console", 0o600, 5, 1);
    let mut order = String::new();
    for path in ModuleTree::read(&modules)?.in_order(&INITRAMFS_MODULES)? {
        let name: PathBuf = Path::new("modules").join(Path::new(&path).file_name().unwrap());
        let name = name.to_string_lossy().into_owned();
        archive.file(&name, 0o644, &std::fs::read(modules.join(&path))?);
        order.push_str(&format!("/{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    std::fs::write(out.join("initrd"), archive.finish())?;
    Ok(())
}

/// Runs a build step; its output goes to stderr.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status}); what it said is above");
    }
    Ok(())
}
