//! The co-process.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// Longest answer in bytes.
const LONGEST: u64 = 4096;
/// How long a program has to end by itself once its input is closed.
const GRACE: Duration = Duration::from_secs(1);

/// A program did not do its part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScriptError {
    #[error("{program}: {source}")]
    Start { program: PathBuf, source: std::io::Error },
    #[error("the program does not run any more; its messages are in the log")]
    NotRunning,
    #[error("the program ended, or closed its output, when it was told {asked:?}; its messages are in the log")]
    Ended { asked: String },
    #[error("the program did not answer {asked:?} within {after:?}")]
    Timeout { asked: String, after: Duration },
    #[error("the program answered {asked:?} with {answer:?}; expected ok, or error and a reason")]
    Answer { asked: String, answer: String },
    #[error("the program says: {0}")]
    Refused(String),
    #[error("{0} does not take this disk: it answered no")]
    NotTaken(PathBuf),
}

/// Refuses a program that somebody else than root could change: it is named by a client or by the other host, and run as root.
pub(crate) fn trusted(program: &Path) -> Result<(), ScriptError> {
    let untrusted =
        |why: String| ScriptError::Start { program: program.to_owned(), source: std::io::Error::other(why) };
    if !program.is_absolute() {
        return Err(untrusted("its path is not absolute".into()));
    }
    let found = std::fs::metadata(program)
        .map_err(|error| untrusted(format!("{error}; it has to be on both hosts, under the same path")))?;
    let own = nix::unistd::Uid::effective().as_raw();
    if !(found.uid() == 0 || found.uid() == own) || found.mode() & 0o022 != 0 {
        return Err(untrusted("others than root can change it".into()));
    }
    Ok(())
}

/// A running program, the leader of its process group.
pub(crate) struct Process {
    child: Child,
    group: Group,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// `about` says in the log what it is for.
    pub(crate) fn start(
        program: &Path,
        environment: &BTreeMap<String, String>,
        about: String,
    ) -> Result<Self, ScriptError> {
        let start = |source| ScriptError::Start { program: program.to_owned(), source };
        let mut command = Command::new(program);
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in environment {
            // A value with a NUL could not be passed.
            command.env(name, value.replace('\0', ""));
        }
        let mut child = command.spawn().map_err(start)?;
        let missing = || start(std::io::Error::other("it has no standard streams"));
        let (Some(input), Some(output), Some(messages), Some(pid)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take(), child.id())
        else {
            return Err(missing());
        };
        let name = program.display().to_string();
        tokio::spawn(async move {
            let mut lines = BufReader::new(messages).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                tracing::info!(program = name, device = about, "{line}");
            }
        });
        Ok(Self {
            child,
            group: Group { id: Pid::from_raw(pid as i32), over: false },
            input,
            output: BufReader::new(output),
        })
    }

    /// Sends a line and returns the answer's, without its end.
    pub(crate) async fn ask(&mut self, line: &str, within: Duration) -> Result<String, ScriptError> {
        let asked = || line.to_owned();
        let exchange = async {
            self.input.write_all(format!("{line}\n").as_bytes()).await?;
            let mut answer = String::new();
            (&mut self.output).take(LONGEST).read_line(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        match timeout(within, exchange).await {
            Err(_) => Err(ScriptError::Timeout { asked: asked(), after: within }),
            Ok(Ok(answer)) if answer.ends_with('\n') => Ok(answer.trim_end().to_owned()),
            Ok(_) => Err(ScriptError::Ended { asked: asked() }),
        }
    }

    /// Closes its input, and ends the whole group if it does not end soon.
    pub(crate) async fn end(self) {
        let Self { mut child, mut group, input, output } = self;
        drop((input, output));
        // The group's number stays taken for as long as it has members; with none left the kernel says so.
        let leader = timeout(GRACE, child.wait()).await;
        match leader {
            Ok(_) => group.kill(),
            Err(_) => {
                group.kill();
                drop(child.wait().await);
            }
        }
    }
}

/// Ends the group with its handle.
struct Group {
    id: Pid,
    over: bool,
}

impl Group {
    fn kill(&mut self) {
        if !std::mem::replace(&mut self.over, true)
            && let Err(error) = killpg(self.id, Signal::SIGKILL)
        {
            tracing::debug!(%error, group = %self.id, "a device program is gone already");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}
