//! A helper process with its own process group, killed as a whole, whose last words are kept.

use std::{
    collections::VecDeque,
    io,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
};

/// Lines of standard error that are kept for messages.
const KEPT_LINES: usize = 20;

/// A running child. Dropping it kills its process group.
#[derive(Debug)]
pub struct ChildGroup {
    child: Child,
    name: &'static str,
    lines: Arc<Mutex<VecDeque<String>>>,
    stderr: Option<JoinHandle<()>>,
}

impl ChildGroup {
    /// Starts the command with piped standard streams, in a process group of its own. Its standard error goes to the log,
    /// line by line, under `name`.
    ///
    /// # Errors
    /// Whatever starting the process fails with.
    pub fn spawn(name: &'static str, mut command: Command) -> io::Result<(Self, ChildStdin, ChildStdout)> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn()?;
        let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("the child's standard streams are not pipes"));
        };
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&lines);
        let task = tokio::spawn(async move {
            let mut reader = BufReader::new(stderr);
            let mut raw = Vec::new();
            // A line without end must not fill the memory (R8), so it is cut where the reader's buffer is.
            loop {
                raw.clear();
                match (&mut reader).read_until_or_full(&mut raw).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
                let line = String::from_utf8_lossy(&raw).trim_end().to_owned();
                if line.is_empty() {
                    continue;
                }
                tracing::info!(target: "remusd::child", name, "{line}");
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        });
        let group = Self { child, name, lines, stderr: Some(task) };
        Ok((group, stdin, stdout))
    }

    /// The child's process id while it has not been waited for.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the child's end. Cancel safe.
    ///
    /// # Errors
    /// Whatever waiting fails with.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Kills the child and all of its group that has not left it.
    pub fn kill(&mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // ESRCH: all gone already, as wished.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// The kept lines of standard error, oldest first.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let kept = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().cloned().collect()
    }

    /// Waits up to `patience` for the child's end and tells how it ended and what it said last. Kills what does not end.
    pub async fn last_words(&mut self, patience: Duration) -> String {
        let status = tokio::time::timeout(patience, self.child.wait()).await;
        if status.is_err() {
            self.kill();
        }
        // A grandchild may keep standard error open, so this is bounded too.
        if let Some(task) = self.stderr.take() {
            let _ = tokio::time::timeout(patience, task).await;
        }
        let lines = self.lines();
        let tail = lines[lines.len().saturating_sub(5)..].join(" / ");
        match (status, tail.is_empty()) {
            (Ok(Ok(status)), true) => format!("{} ended with {status}", self.name),
            (Ok(Ok(status)), false) => format!("{tail} ({} ended with {status})", self.name),
            (_, true) => format!("{} said nothing", self.name),
            (_, false) => tail,
        }
    }
}

impl Drop for ChildGroup {
    fn drop(&mut self) {
        self.kill();
        if let Some(task) = self.stderr.take() {
            task.abort();
        }
    }
}

/// Reads up to and including a newline, or as much as one buffer holds.
trait ReadLine {
    async fn read_until_or_full(self, into: &mut Vec<u8>) -> io::Result<usize>;
}

impl<R: tokio::io::AsyncRead + Unpin> ReadLine for &mut BufReader<R> {
    async fn read_until_or_full(self, into: &mut Vec<u8>) -> io::Result<usize> {
        const LONGEST: usize = 4096;
        loop {
            let chunk = self.fill_buf().await?;
            if chunk.is_empty() {
                return Ok(into.len());
            }
            let end = chunk.iter().position(|b| *b == b'\n').map(|at| at + 1);
            let take = end.unwrap_or(chunk.len());
            into.extend_from_slice(&chunk[..take]);
            self.consume(take);
            if end.is_some() || into.len() >= LONGEST {
                return Ok(into.len());
            }
        }
    }
}
