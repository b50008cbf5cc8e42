//! What init does before it serves: mounts, modules, network.

mod cmdline;
mod net;

pub use cmdline::{CmdlineError, NetConfig};

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use crate::server::End;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system could not be mounted.
    #[error("mounting {what} on {at}: {source}")]
    Mount {
        /// The file system.
        what: &'static str,
        /// Where.
        at: &'static str,
        /// Why.
        source: nix::Error,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a module.
    #[error("loading module {name}: {source}")]
    Module {
        /// Its file name.
        name: String,
        /// Why.
        source: nix::Error,
    },
    /// The servers could not start.
    #[error("starting the servers: {0}")]
    Servers(#[source] io::Error),
    /// The kernel command line is wrong.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The interface could not be set up.
    #[error("interface {name}: {what}: {source}")]
    Net {
        /// The interface.
        name: String,
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Mounts proc, sys and devtmpfs, as far as they are not.
///
/// # Errors
/// [`BootError::Mount`].
pub fn mount_all() -> Result<(), BootError> {
    for (what, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        // An error here shows as one of mount.
        let _ = fs::create_dir_all(at);
        match mount(Some(what), at, Some(what), MsFlags::empty(), None::<&str>) {
            Ok(()) | Err(nix::Error::EBUSY) => {}
            Err(source) => return Err(BootError::Mount { what, at, source }),
        }
    }
    Ok(())
}

/// Makes this program `/sbin/poweroff` and `/sbin/reboot` too: the kernel
/// runs them when the toolstack asks for a shutdown, and does nothing on
/// `xl shutdown` if they are missing.
///
/// # Errors
/// [`BootError::File`].
pub fn install_shutdown_helpers() -> Result<(), BootError> {
    let _ = fs::create_dir_all("/sbin");
    for name in ["/sbin/poweroff", "/sbin/reboot"] {
        match symlink("/init", name) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(BootError::File { path: name.into(), source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Loads the modules that the file `list` in `/modules` names; none if it is missing.
///
/// # Errors
/// The first module that does not load ends it.
pub fn load_modules(list: &str) -> Result<(), BootError> {
    let dir = Path::new("/modules");
    let Ok(order) = fs::read_to_string(dir.join(list)) else {
        return Ok(());
    };
    for name in order.split_ascii_whitespace() {
        let path = dir.join(name);
        let file = File::open(&path).map_err(|source| BootError::File { path: path.display().to_string(), source })?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(source) => {
                return Err(BootError::Module { name: name.into(), source });
            }
        }
    }
    Ok(())
}

/// Sets up the network as the kernel command line says, waiting up to
/// `timeout` for the interface to appear. `None`: no address was given.
///
/// # Errors
/// A wrong command line, no interface, or the kernel refused an address.
pub fn network(timeout: std::time::Duration) -> Result<Option<NetConfig>, BootError> {
    let path = "/proc/cmdline";
    let text = fs::read_to_string(path).map_err(|source| BootError::File { path: path.into(), source })?;
    let Some(config) = NetConfig::from_cmdline(&text)? else {
        return Ok(None);
    };
    net::set_up(&config, timeout)?;
    Ok(Some(config))
}

/// Ends the guest. Returns only if the kernel refuses.
pub fn end(how: End) {
    let failed = match how {
        End::Poweroff => reboot(RebootMode::RB_POWER_OFF).map(|_| ()),
        End::Reboot => reboot(RebootMode::RB_AUTOBOOT).map(|_| ()),
        End::Crash => fs::write("/proc/sysrq-trigger", "c")
            .map_err(|e| nix::Error::from_raw(e.raw_os_error().unwrap_or(libc::EIO))),
    };
    eprintln!("guest: {how:?} failed: {failed:?}");
}
