//! A program as the witness: any quorum or fence tool. docs/witness.md has the contract.
//!
//! The program runs in a process group of its own, which is killed as a whole when the time is over; then its outcome is unknown.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::client::{CasReply, ReadError};
use super::config::{ConfigError, ScriptConfig};
use super::record::{Position, Record, RecordState, Versioned};
use super::store::WitnessStore;
use crate::ids::ProtectionId;
use crate::link::child::ChildGroup;

/// A record is well under 1 KiB.
const LONGEST_ANSWER: u64 = 64 * 1024;
/// For what was said on standard error, after the program has ended.
const PATIENCE: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub struct ScriptStore {
    path: PathBuf,
    timeout: Duration,
}

/// A run that ended by itself.
struct Run {
    /// `None`: killed by a signal.
    code: Option<i32>,
    stdout: Vec<u8>,
    said: String,
}

impl ScriptStore {
    /// Checks the settings; runs nothing.
    ///
    /// # Errors
    /// [`ConfigError`] if the path is not absolute or there is no file.
    pub fn new(config: &ScriptConfig) -> Result<Self, ConfigError> {
        if !(100..=600_000).contains(&config.timeout_ms) {
            return Err(ConfigError::Setting(format!(
                "script.timeout_ms is {}, and has to be 100 to 600000",
                config.timeout_ms
            )));
        }
        let path = config.path.clone();
        if !path.is_absolute() {
            return Err(ConfigError::Setting(format!("script.path {} is not absolute", path.display())));
        }
        if let Err(e) = std::fs::metadata(&path) {
            return Err(ConfigError::File { path, text: e.to_string() });
        }
        Ok(Self { path, timeout: Duration::from_millis(config.timeout_ms) })
    }

    /// Runs the program to its end, or kills it and says why.
    async fn run(&self, action: &str, protection: Option<ProtectionId>, env: &[(&str, &str)]) -> Result<Run, String> {
        let mut command = Command::new(&self.path);
        command.arg(action);
        if let Some(protection) = protection {
            command.arg(protection.to_string());
        }
        command.envs(env.iter().copied());
        let (mut child, stdin, mut stdout) = ChildGroup::spawn("witness script", command)
            .map_err(|e| format!("{} cannot be started: {e}", self.path.display()))?;
        drop(stdin);
        let end = async {
            let mut bytes = vec![];
            (&mut stdout).take(LONGEST_ANSWER).read_to_end(&mut bytes).await?;
            Ok::<_, std::io::Error>((bytes, child.wait().await?))
        };
        match tokio::time::timeout(self.timeout, end).await {
            Ok(Ok((stdout, status))) => {
                let said = child.last_words(PATIENCE).await;
                Ok(Run { code: status.code(), stdout, said })
            }
            Ok(Err(e)) => Err(format!("{} {action}: {e}", self.path.display())),
            Err(_) => {
                child.kill();
                Err(format!("{} {action} was killed after {} ms", self.path.display(), self.timeout.as_millis()))
            }
        }
    }

    fn position() -> Position {
        Position { store: "script".into(), revision: 0, modified: 0 }
    }
}

/// The record that a program printed, `None` if nothing.
fn printed(protection: ProtectionId, stdout: &[u8]) -> Result<Option<Record>, String> {
    let stdout = stdout.trim_ascii();
    if stdout.is_empty() {
        return Ok(None);
    }
    Record::from_json(protection, stdout).map(Some)
}

/// The host that could run the guest too while this change is made: a tool that fences switches it off first. Empty when the record
/// itself says that it cannot.
fn to_fence<'a>(expected: Option<&Record>, new: &'a Record) -> &'a str {
    let contested = new.state == RecordState::Claimed
        && expected.is_none_or(|old| {
            let forced = old.generation != new.generation;
            let taken_back = old.state == RecordState::HandedTo && old.owner.is(&new.owner);
            forced || taken_back || old.state == RecordState::Armed
        });
    if contested { &new.peer.name } else { "" }
}

#[async_trait]
impl WitnessStore for ScriptStore {
    async fn read(&self, protection: ProtectionId) -> Result<Versioned, ReadError> {
        let run = self.run("read", Some(protection), &[]).await.map_err(ReadError::Unavailable)?;
        if run.code != Some(0) {
            return Err(ReadError::Unavailable(run.said));
        }
        let record = printed(protection, &run.stdout).map_err(ReadError::Unreadable)?;
        Ok(Versioned { record, position: Self::position() })
    }

    async fn cas(&self, protection: ProtectionId, expected: &Versioned, new: &Record) -> CasReply {
        let old = expected.record.as_ref().map(Record::to_json).unwrap_or_default();
        let fence = to_fence(expected.record.as_ref(), new);
        let state =
            serde_json::to_value(new.state).ok().and_then(|s| s.as_str().map(str::to_owned)).unwrap_or_default();
        let json = new.to_json();
        let env = [
            ("REMUS_EXPECTED", old.as_str()),
            ("REMUS_NEW", json.as_str()),
            ("REMUS_STATE", state.as_str()),
            ("REMUS_OWNER", new.owner.name.as_str()),
            ("REMUS_PEER", new.peer.name.as_str()),
            ("REMUS_FENCE", fence),
        ];
        let run = match self.run("swap", Some(protection), &env).await {
            Ok(run) => run,
            Err(text) => return CasReply::Unknown(text),
        };
        match (run.code, printed(protection, &run.stdout)) {
            (Some(0), Ok(Some(there))) if there == *new => CasReply::Applied(Self::position()),
            (Some(0), _) => CasReply::Unknown("the witness script says that it won, but prints another holder".into()),
            (Some(1), _) => CasReply::Conflict,
            _ => CasReply::Unknown(run.said),
        }
    }

    async fn probe(&self) -> Result<Position, String> {
        let run = self.run("probe", None, &[]).await?;
        if run.code == Some(0) { Ok(Self::position()) } else { Err(run.said) }
    }

    fn describe(&self) -> String {
        format!("script {}", self.path.display())
    }
}
