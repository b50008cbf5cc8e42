//! `[events]`: the program that is run for each event.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::ops::EventKind;

/// `[events]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Events {
    /// A program, by its whole path, that is run for each event on this host with the event as a line of JSON on standard input. It runs
    /// with the daemon's rights. Without it nobody is told.
    #[serde(deserialize_with = "program")]
    pub hook: Option<PathBuf>,
    /// Only for these kinds of events; without it for all.
    pub hook_kinds: Option<Vec<EventKind>>,
    /// So many milliseconds it may take for one event, 100 to 600 000; then it is killed.
    #[serde(deserialize_with = "timeout")]
    pub hook_timeout_ms: u64,
}

impl Default for Events {
    fn default() -> Self {
        Self { hook: None, hook_kinds: None, hook_timeout_ms: 10_000 }
    }
}

impl Events {
    /// Whether the hook could be run now.
    ///
    /// # Errors
    /// A sentence: it is not there, or no program.
    pub fn look(&self) -> Result<(), String> {
        self.hook.as_deref().map_or(Ok(()), look)
    }
}

fn look(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let metadata = std::fs::metadata(path).map_err(|error| format!("events.hook: {shown}: {error}"))?;
    if !metadata.is_file() {
        return Err(format!("events.hook: {shown} is not a file"));
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(format!("events.hook: {shown} is not executable; `chmod +x {shown}` makes it so"));
    }
    Ok(())
}

fn program<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    match path.is_absolute() {
        true => Ok(Some(path)),
        false => Err(serde::de::Error::custom(format!("hook is {}: give the whole path of a program", path.display()))),
    }
}

fn timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let ms = u64::deserialize(deserializer)?;
    match (100..=600_000).contains(&ms) {
        true => Ok(ms),
        false => Err(serde::de::Error::custom(format!("hook_timeout_ms is {ms}: choose 100 to 600000"))),
    }
}
