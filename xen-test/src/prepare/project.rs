//! The project's programs in the dom0s.

use std::path::PathBuf;

use anyhow::Result;

use super::{cargo, target_dir, workspace};
use crate::host::Host;

/// Built programs and scripts.
#[derive(Debug)]
pub struct Project {
    programs: Vec<PathBuf>,
    scripts: Vec<PathBuf>,
}

/// Builds the programs in the profile of this harness.
pub fn build() -> Result<Project> {
    crate::progress!("building remusd and remus");
    let release = !cfg!(debug_assertions);
    cargo(|command| {
        // With the harness itself: the libraries are then built once, with one set of features, for both.
        command.args(["build", "-q", "-p", "xen-test", "-p", "remusd", "-p", "devices", "--bins"]);
        if release {
            command.arg("--release");
        }
    })?;
    let dir = target_dir()?.join(if release { "release" } else { "debug" });
    let programs =
        ["remusd", "remus", "remus-disk", "netbuffer-selftest", "engine-compare"].map(|name| dir.join(name)).to_vec();
    let scripts = match std::fs::read_dir(workspace()?.join("scripts")) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).filter(|p| p.is_file()).collect(),
        // There are none yet.
        Err(_) => Vec::new(),
    };
    Ok(Project { programs, scripts })
}

impl Project {
    /// Programs and `xl-remus` go to /usr/local/sbin, all scripts also to /usr/local/lib/remus.
    pub fn install(&self, host: &Host) -> Result<()> {
        host.push(&self.programs, "/usr/local/sbin/")?;
        if !self.scripts.is_empty() {
            host.push(&self.scripts, "/usr/local/lib/remus/")?;
            host.sh("cd /usr/local/lib/remus && [ ! -e xl-remus ] || \
                 ln -sf /usr/local/lib/remus/xl-remus /usr/local/sbin/xl-remus")?;
        }
        Ok(())
    }
}
