//! The stock receiver, `xl migrate-receive` in its plain form (hazard F1): any end of its input before GO leaves nothing running.
//!
//! What is said on its standard streams is in [`crate::stream::handshake`], from Xen 4.17's `xl_migrate.c`.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::error::BackupError;
use super::feed::{FeedPipe, enlarge};
use crate::link::child::ChildGroup;
use crate::stream::handshake::{BANNER, READY, REPORT};

/// The receiver's process.
#[async_trait]
pub trait ReceiverProcess: Send {
    /// Waits for its end and tells how it ended and what it said last. Cancel safe.
    async fn ended(&mut self) -> String;

    /// Kills it with all its children.
    fn kill(&mut self);
}

/// A started receiver.
pub struct Receiver {
    /// Its standard input.
    pub input: Box<dyn FeedPipe>,
    /// Its standard output.
    pub output: Box<dyn AsyncRead + Send + Unpin>,
    /// Its process.
    pub process: Box<dyn ReceiverProcess>,
}

/// Starts receivers.
#[async_trait]
pub trait ReceiverSource: Send + Sync {
    /// Starts one. `no_monitor`: it does not stay behind as the domain's monitor (`xl migrate-receive -e`).
    async fn start(&self, no_monitor: bool) -> Result<Receiver, BackupError>;
}

/// The command that receives.
///
/// xl holds `/var/lock/xl` through a whole restore when it balloons dom0 by itself (`autoballoon`, on without `dom0_mem`): a
/// second protection to this host and every `xl create` on it would hang (hazard F25a). Set `dom0_mem` or `autoballoon="off"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiverCommand {
    /// xl, or what stands in for it.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Default for ReceiverCommand {
    fn default() -> Self {
        Self { program: "xl".into(), arguments: vec!["migrate-receive".into()] }
    }
}

struct XlProcess(ChildGroup);

#[async_trait]
impl ReceiverProcess for XlProcess {
    async fn ended(&mut self) -> String {
        // The error of a wait is told by last_words.
        let _ = self.0.wait().await;
        self.0.last_words(Duration::from_millis(500)).await
    }

    fn kill(&mut self) {
        self.0.kill();
    }
}

#[async_trait]
impl ReceiverSource for ReceiverCommand {
    async fn start(&self, no_monitor: bool) -> Result<Receiver, BackupError> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        if no_monitor {
            command.arg("-e");
        }
        let spawned = ChildGroup::spawn("receiver", command);
        let (child, input, output) =
            spawned.map_err(|source| BackupError::Spawn { program: self.program.clone(), source })?;
        enlarge(&input);
        Ok(Receiver { input: Box::new(input), output: Box::new(output), process: Box::new(XlProcess(child)) })
    }
}

/// Awaits the receiver's first words.
///
/// # Errors
/// [`BackupError::Receiver`] if it says something else, ends, or stays silent for `patience`.
pub async fn await_banner(receiver: &mut Receiver, patience: Duration) -> Result<(), BackupError> {
    let what = "announce itself";
    match tokio::time::timeout(patience, expect(&mut receiver.output, BANNER)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let ended = tokio::time::timeout(Duration::from_secs(1), receiver.process.ended()).await;
            receiver.process.kill();
            Err(BackupError::Receiver { what, said: ended.unwrap_or_else(|_| error.to_string()) })
        }
        Err(_) => {
            receiver.process.kill();
            Err(BackupError::Receiver { what, said: format!("silence for {} s", patience.as_secs()) })
        }
    }
}

/// Awaits that the domain is built. Waits as long as it takes: what is built before may be fed for weeks.
///
/// # Errors
/// If the receiver says something else or closes its output.
pub async fn await_ready(output: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    expect(output, READY).await
}

/// Awaits the result of GO.
///
/// # Errors
/// If the receiver says something else, closes its output, or reports that the copy could not be started.
pub async fn await_result(output: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    expect(output, REPORT).await?;
    match output.read_u8().await? {
        0 => Ok(()),
        code => Err(io::Error::other(format!(
            "xl could not rename or unpause its copy (result {code}) and has destroyed it"
        ))),
    }
}

async fn expect(output: &mut (impl AsyncRead + Unpin), words: &'static [u8]) -> io::Result<()> {
    let mut said = vec![0; words.len()];
    let mut length = 0;
    while length < words.len() {
        match output.read(&mut said[length..]).await? {
            0 => break,
            read => length += read,
        }
        // Told as soon as it differs: whoever says something else may say less than we wait for.
        if said[..length] != words[..length] {
            break;
        }
    }
    if said == words {
        return Ok(());
    }
    let said = said[..length].escape_ascii();
    Err(io::Error::other(format!("expected \"{}\", got \"{said}\"", words.escape_ascii())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ReceiverCommand {
        ReceiverCommand { program: "sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    #[tokio::test]
    async fn the_banner_is_awaited_and_the_last_words_are_kept() {
        let patience = Duration::from_secs(5);
        let good = "printf 'xl migration receiver ready, send binary domain data.\\n'; cat >/dev/null";
        let mut receiver = shell(good).start(false).await.unwrap();
        await_banner(&mut receiver, patience).await.unwrap();
        drop(receiver.input);
        assert_eq!(receiver.process.ended().await, "receiver ended with exit status: 0");

        let mut receiver = shell("echo 'libxl: error: no memory' >&2; exit 3").start(false).await.unwrap();
        let error = await_banner(&mut receiver, patience).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the receiver did not announce itself: libxl: error: no memory (receiver ended with exit status: 3)"
        );

        let mut receiver = shell("exec sleep 60").start(false).await.unwrap();
        assert!(await_banner(&mut receiver, Duration::from_millis(50)).await.is_err());
        assert!(receiver.process.ended().await.contains("signal: 9"), "a silent one is killed");

        let missing = ReceiverCommand { program: "/nonexistent/xl".into(), arguments: vec![] };
        let error = missing.start(false).await.err().unwrap();
        assert!(error.to_string().contains("xen-utils"), "{error}");
    }

    #[tokio::test]
    async fn a_kill_reaches_the_receivers_children() {
        let mut receiver = shell("sleep 60 & echo $! >&2; wait").start(false).await.unwrap();
        let mut nothing = [0];
        receiver.process.kill();
        // The output ends only when the last process that holds it is gone.
        assert_eq!(receiver.output.read(&mut nothing).await.unwrap(), 0);
        assert!(receiver.process.ended().await.contains("signal: 9"));
    }

    #[tokio::test]
    async fn the_result_byte_counts() {
        let said = |code: u8| [REPORT, &[code]].concat();
        await_result(&mut &said(0)[..]).await.unwrap();
        assert!(await_result(&mut &said(3)[..]).await.unwrap_err().to_string().contains("result 3"));
        assert!(await_ready(&mut &READY[..5]).await.is_err());
        await_ready(&mut &READY[..]).await.unwrap();
    }
}
