//! Finding the Xen libraries of the running hypervisor.
//!
//! libxenctrl and libxenguest are locked to one Xen version, so they are opened by versioned soname. The crate xenctrl opens the
//! unversioned `libxenctrl.so`, which only libxen-dev ships: [`ensure`] makes that name good on a dom0 without it.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::hypervisor::XenError;

/// Versions to try when the hypervisor's cannot be read; `xc_shadow_control` and `xc_domain_resume` are the same in all of them.
const FALLBACK: [&str; 5] = ["4.17", "4.18", "4.19", "4.20", "4.16"];
const UNVERSIONED: &str = "libxenctrl.so";
const DIRECTORY: &str = "/run/remus/lib";
const SEARCH: &str = "LD_LIBRARY_PATH";
/// Holds what `LD_LIBRARY_PATH` was before; that it is set says that we have re-executed ourselves.
const SAVED: &str = "REMUS_SAVED_LD_LIBRARY_PATH";

/// The versions to try, the running hypervisor's first.
fn versions() -> Vec<String> {
    let part = |name: &str| {
        let text = fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok()?;
        Some(text.trim().to_owned())
    };
    match (part("major"), part("minor")) {
        (Some(major), Some(minor)) => vec![format!("{major}.{minor}")],
        _ => FALLBACK.map(str::to_owned).to_vec(),
    }
}

fn open(name: &str, flags: i32) -> Result<Library, String> {
    // SAFETY: a Xen library's initialisers do nothing that could harm: no threads, no signal handlers.
    unsafe { Library::open(Some(name), flags) }.map_err(|error| error.to_string())
}

/// Opens a library that is locked to the Xen version, such as "libxenguest".
///
/// # Errors
/// [`XenError::Library`] when no version of it can be opened.
pub(super) fn versioned(stem: &str) -> Result<Library, XenError> {
    let mut failures = Vec::new();
    for version in versions() {
        match open(&format!("{stem}.so.{version}"), RTLD_NOW | RTLD_GLOBAL) {
            Ok(library) => return Ok(library),
            Err(failure) => failures.push(failure),
        }
    }
    Err(XenError::Library { library: stem.into(), cause: failures.join("; ") })
}

/// Opens a library with a stable soname, such as "libxenstore.so.4".
///
/// # Errors
/// [`XenError::Library`].
pub(super) fn stable(name: &str) -> Result<Library, XenError> {
    open(name, RTLD_NOW).map_err(|cause| XenError::Library { library: name.into(), cause })
}

/// Makes the unversioned `libxenctrl.so` findable for the crate xenctrl. Call first thing in `main`, before any thread exists.
///
/// When the name cannot be opened but a versioned library can: makes a symbolic link to it in a directory that only root can
/// write, and executes this program anew with that directory in `LD_LIBRARY_PATH`; the new run puts the variable back, so that
/// children do not see it. Returns at once when there is nothing to do, or nothing that can be done: then opening the hypervisor
/// will say why.
///
/// # Errors
/// [`XenError::Library`] when the link cannot be made or the program cannot be executed.
pub fn ensure() -> Result<(), XenError> {
    if let Some(saved) = std::env::var_os(SAVED) {
        // SAFETY: called before any thread is started, as the documentation demands; nobody reads the environment meanwhile.
        unsafe {
            std::env::remove_var(SAVED);
            if saved.is_empty() {
                std::env::remove_var(SEARCH);
            } else {
                std::env::set_var(SEARCH, &saved);
            }
        }
        return Ok(());
    }
    if open(UNVERSIONED, RTLD_NOW).is_ok() {
        return Ok(());
    }
    let Some(library) = versioned("libxenctrl").ok().and_then(|_| loaded_path()) else {
        return Ok(());
    };
    let fail = |error: io::Error| XenError::Library {
        library: UNVERSIONED.into(),
        cause: format!("no link to {} in {DIRECTORY}: {error}", library.display()),
    };
    link(&library).map_err(fail)?;
    Err(fail(execute_anew()))
}

/// The path of the versioned library that [`versioned`] has opened, from the process's own map.
fn loaded_path() -> Option<PathBuf> {
    fs::read_to_string("/proc/self/maps")
        .ok()?
        .lines()
        .filter_map(|line| line.split_once('/').map(|(_, path)| format!("/{path}")))
        .find(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with("libxenctrl.so.")))
        .map(PathBuf::from)
}

fn link(library: &Path) -> io::Result<()> {
    let directory = Path::new(DIRECTORY);
    fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let owner = fs::symlink_metadata(directory)?;
    // What is in this directory is loaded into a root process.
    if !owner.is_dir() || owner.uid() != nix::unistd::geteuid().as_raw() || owner.mode() & 0o022 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the directory is not ours alone"));
    }
    let name = directory.join(UNVERSIONED);
    if fs::read_link(&name).is_ok_and(|target| target == library) {
        return Ok(());
    }
    // By rename: another remus process may do the same at this moment.
    let fresh = directory.join(format!("{UNVERSIONED}.{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    symlink(library, &fresh)?;
    fs::rename(&fresh, &name)
}

/// Returns only when it failed.
fn execute_anew() -> io::Error {
    let before = std::env::var_os(SEARCH).unwrap_or_default();
    let mut search = OsString::from(DIRECTORY);
    if !before.is_empty() {
        search.push(":");
        search.push(&before);
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    // By its own path: the kernel names a process after it, and operators look for "remusd".
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    std::process::Command::new(program).arg0(name).args(arguments).env(SEARCH, search).env(SAVED, before).exec()
}
