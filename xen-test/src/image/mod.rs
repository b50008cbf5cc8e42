//! The dom0 image: built from Debian packages once, then cached by what it is made of.

mod build;
pub mod cpio;
mod key;
pub mod modules;
mod tools;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

pub use key::short_hash;
pub use tools::{ensure_tools, find_program};

use crate::progress;

/// Touched in an image's directory whenever it is used.
const USED: &str = "used";

/// Images unused for so long make room when a new one is built. No run lasts that long.
const UNUSED_AGE: Duration = Duration::from_secs(3 * 24 * 3600);

/// A file of ours inside the image.
struct OverlayFile {
    path: &'static str,
    mode: u32,
    text: &'static str,
}

const OVERLAY: &[OverlayFile] = &[
    OverlayFile { path: "usr/lib/xen-test/init", mode: 0o755, text: include_str!("overlay/xt-init") },
    OverlayFile { path: "usr/lib/xen-test/agent.py", mode: 0o644, text: include_str!("overlay/agent.py") },
    OverlayFile { path: "etc/xen/xl.conf", mode: 0o644, text: "autoballoon=\"off\"\nvif.default.bridge=\"xenbr0\"\n" },
    OverlayFile {
        path: "etc/hosts",
        mode: 0o644,
        text: "127.0.0.1 localhost\n::1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n\
               10.77.0.100 client\nfd77::1 hosta6\nfd77::2 hostb6\nfd77::100 client6\n",
    },
    OverlayFile {
        path: "etc/ssh/sshd_config",
        mode: 0o644,
        text: "HostKey /etc/ssh/ssh_host_ed25519_key\nPermitRootLogin yes\n\
               PasswordAuthentication no\nUsePAM no\nUseDNS no\nPrintMotd no\n\
               MaxStartups 100\nMaxSessions 100\nSubsystem sftp /usr/lib/openssh/sftp-server\n",
    },
    OverlayFile {
        path: "etc/ssh/ssh_config",
        mode: 0o644,
        text: "Host *\n    BatchMode yes\n    KexAlgorithms curve25519-sha256\n    StrictHostKeyChecking yes\n\
               \x20   GSSAPIAuthentication no\n",
    },
    OverlayFile { path: "etc/resolv.conf", mode: 0o644, text: "" },
    OverlayFile { path: "root/.bashrc", mode: 0o644, text: "PS1='\\h:\\w# '\nalias ll='ls -la'\n" },
];

/// A finished image: the directory of its files.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The hypervisor, as an ELF file that QEMU can start.
    pub fn hypervisor(&self) -> PathBuf {
        self.dir.join("xen.elf")
    }

    /// Kernel of dom0 and of the test guests.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The small initramfs that mounts the root disk.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// Root disk, raw ext4; never written, hosts use overlays of it.
    pub fn root_disk(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    /// Key that opens ssh to both hosts.
    pub fn ssh_key(&self) -> PathBuf {
        self.dir.join("id_ed25519")
    }

    /// The hosts' ssh host keys.
    pub fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    /// Modules of [`Image::kernel`], with their `modules.dep`.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The image's directory in the cache.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the image in the cache: a hash of all that it is made of.
    pub fn key(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// Where images, runs and logs are kept: `$XEN_TEST_CACHE`, else `remus-xen-test` below
/// `$XDG_CACHE_HOME`, else below `~/.cache`.
pub fn cache_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("XEN_TEST_CACHE") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => match std::env::var_os("XDG_CACHE_HOME") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("remus-xen-test"),
            _ => {
                PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/remus-xen-test")
            }
        },
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("cannot use {}", dir.display()))
}

/// The current image, built if the cache lacks it. Only one process builds at a time; the others
/// wait. A build that was cut short is never used: it lives under another name until it is whole.
pub fn ensure() -> Result<Image> {
    ensure_tools()?;
    let images = cache_dir()?.join("images");
    std::fs::create_dir_all(&images)?;
    let _lock = lock(&images.join("lock"), "another xen-test is building the image: waiting")?;
    let resolution = key::resolve(&images)?;
    let build_rules: [&[u8]; 2] = [include_bytes!("build.rs"), include_bytes!("key.rs")];
    let initramfs: &[u8] = include_bytes!("overlay/initramfs-init");
    let overlay = OVERLAY
        .iter()
        .flat_map(|file| [file.path.as_bytes(), file.text.as_bytes(), if file.mode & 1 == 1 { b"x" } else { b"-" }]);
    let parts = [resolution.text.as_bytes(), initramfs].into_iter().chain(build_rules);
    let dir = images.join(key::short_hash(parts.chain(overlay)));
    if dir.is_dir() {
        std::fs::write(dir.join(USED), "")?;
        return Ok(Image { dir });
    }
    let start = Instant::now();
    prune(&images)?;
    let building = images.join(format!("building-{}", std::process::id()));
    std::fs::create_dir_all(&building)?;
    build::build(&building, &resolution)?;
    std::fs::write(building.join(USED), "")?;
    std::fs::rename(&building, &dir)?;
    progress!("image {} built in {:.0} s", dir.display(), start.elapsed().as_secs_f32());
    Ok(Image { dir })
}

/// Removes builds that were cut short, and images that nobody has used for long.
fn prune(images: &Path) -> Result<()> {
    for entry in std::fs::read_dir(images)?.flatten() {
        let unfinished = entry.file_name().to_string_lossy().starts_with("building-");
        let unused = std::fs::metadata(entry.path().join(USED))
            .and_then(|meta| meta.modified())
            .is_ok_and(|time| time.elapsed().unwrap_or_default() > UNUSED_AGE);
        if unfinished || unused {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Takes an exclusive lock on a file; says `waiting` if it is not free at once. Blocks.
pub fn lock(path: &Path, waiting: &str) -> Result<Flock<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            progress!("{waiting}");
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| errno)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}
