//! What a restarted service has to take up again. In `/run`, so that nothing of it survives the host (R9): after a boot a
//! disk is closed until its owner opens it.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Runtime {
    /// Clients are served.
    pub(super) open: bool,
    /// The N of `/dev/nbdN`.
    pub(super) nbd: Option<u32>,
    /// How the copy is reached.
    pub(super) via: Option<String>,
}

pub(super) fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.run"))
}

pub(super) fn load(path: &Path) -> io::Result<Runtime> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Runtime::default()),
        Err(error) => Err(error),
    }
}

pub(super) fn save(path: &Path, runtime: &Runtime) -> io::Result<()> {
    let new = path.with_extension("run.new");
    std::fs::write(&new, serde_json::to_vec(runtime).map_err(io::Error::other)?)?;
    std::fs::rename(&new, path)
}
