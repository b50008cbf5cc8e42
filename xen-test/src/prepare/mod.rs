//! What booted hosts get before their snapshot: the test guest and the project's own programs.
//! None of it is in the image, so a change of code builds no image.

mod guest;
mod project;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::pair::Pair;

/// Builds and pushes everything to all hosts of the pair.
pub fn hosts(pair: &Pair) -> Result<()> {
    guests(pair)?;
    project(pair)
}

/// Builds the project's programs and installs them in all hosts.
pub fn project(pair: &Pair) -> Result<()> {
    let project = project::build()?;
    pair.each(|host| project.install(host))
}

/// Builds the test guest and pushes it to /opt/guest of all hosts.
pub fn guests(pair: &Pair) -> Result<()> {
    let guest = guest::files(pair.image(), &pair.run_dir().join("guest"))?;
    pair.each(|host| host.push(&guest, "/opt/guest/"))
}

/// Root of the workspace this program was built from.
fn workspace() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the harness is not in a workspace")?;
    if !root.join("Cargo.toml").is_file() {
        bail!("{} is gone: build xen-test again where the sources are now", root.display());
    }
    Ok(root.to_owned())
}

/// Runs cargo in the workspace; what it says goes to stderr.
fn cargo(configure: impl FnOnce(&mut Command)) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace()?).stdout(std::io::stderr());
    configure(&mut command);
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo failed; what it said is above");
    }
    Ok(())
}

/// Where cargo puts what it builds.
fn target_dir() -> Result<PathBuf> {
    Ok(match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::env::current_dir()?.join(dir),
        None => workspace()?.join("target"),
    })
}
