//! UNSAFE: a stock `xl migrate-receive -r`, for interoperation. It acknowledges nothing, has no heartbeat, and starts its copy on
//! any end of the stream (hazard F1): an epoch counts as acknowledged once it is written.

use std::process::Stdio;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::Mutex;

use crate::ids::Epoch;
use crate::protect::machine::StopWhy;
use crate::protect::peer::{EpochEnd, GuestDoes, Outlet, PeerControl, PeerLost};
use crate::stream::compose::RemusComposer;
use crate::stream::{PageBatch, Record, handshake};

/// The stream to the receiver, shared by the data path and the control path.
struct Stream {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Whether a whole checkpoint is there, so that the receiver would start its copy at an end of the stream.
    activatable: bool,
}

/// The data path.
pub struct StockOutlet {
    stream: Arc<Mutex<Stream>>,
    config: String,
    state: Vec<Record>,
}

/// The control path.
pub struct StockControl {
    stream: Arc<Mutex<Stream>>,
}

/// Starts the command and waits for the receiver's banner.
///
/// # Errors
/// [`PeerLost`] when the command cannot be run or does not say what `xl migrate-receive` says.
pub async fn connect(command: &str, config: String) -> Result<(StockOutlet, StockControl), PeerLost> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(false)
        .process_group(0)
        .spawn()
        .map_err(|e| PeerLost(format!("`{command}` cannot be run: {e}")))?;
    let stdin = child.stdin.take();
    let mut banner = vec![0; handshake::BANNER.len()];
    let mut stdout = child.stdout.take().ok_or_else(|| PeerLost("no standard output".into()))?;
    let read = tokio::time::timeout(std::time::Duration::from_secs(30), stdout.read_exact(&mut banner)).await;
    if !matches!(read, Ok(Ok(_))) || banner != handshake::BANNER {
        let _ = child.kill().await;
        return Err(PeerLost(format!(
            "`{command}` did not greet like xl migrate-receive; it said {:?}",
            String::from_utf8_lossy(&banner).trim_end_matches('\0')
        )));
    }
    let stream = Arc::new(Mutex::new(Stream { child, stdin, activatable: false }));
    Ok((StockOutlet { stream: stream.clone(), config, state: Vec::new() }, StockControl { stream }))
}

impl StockOutlet {
    async fn write(&self, parts: &[bytes::Bytes]) -> Result<u64, PeerLost> {
        let mut stream = self.stream.lock().await;
        let Some(stdin) = stream.stdin.as_mut() else { return Err(PeerLost("the stream has ended".into())) };
        let mut bytes = 0;
        for part in parts {
            stdin.write_all(part).await.map_err(|e| PeerLost(format!("the stock receiver: {e}")))?;
            bytes += part.len() as u64;
        }
        Ok(bytes)
    }
}

impl From<crate::stream::StreamError> for PeerLost {
    fn from(error: crate::stream::StreamError) -> Self {
        Self(error.to_string())
    }
}

#[async_trait]
impl Outlet for StockOutlet {
    async fn preamble(&mut self, bytes: bytes::Bytes) -> Result<(), PeerLost> {
        let head = RemusComposer::head(&self.config, &bytes)?;
        self.write(&head).await.map(drop)
    }

    async fn begin(&mut self, _: Epoch, _: bool) -> Result<(), PeerLost> {
        self.state.clear();
        Ok(())
    }

    async fn pages(&mut self, _: Epoch, batch: PageBatch) -> Result<u64, PeerLost> {
        let parts = RemusComposer::pages(&batch)?;
        self.write(&parts).await
    }

    async fn record(&mut self, _: Epoch, record: Record) -> Result<u64, PeerLost> {
        let size = record.body.len() as u64;
        self.state.push(record);
        Ok(size)
    }

    async fn end(&mut self, _: EpochEnd) -> Result<(), PeerLost> {
        let end = RemusComposer::end_of_epoch(&self.state);
        self.write(&[end]).await?;
        self.stream.lock().await.activatable = true;
        Ok(())
    }
}

#[async_trait]
impl PeerControl for StockControl {
    /// Makes the receiver fail while it applies a checkpoint, the one way to have it give up its copy (facts of Xen 4.17,
    /// `libxl_stream_read.c`: an unknown record between CHECKPOINT and CHECKPOINT_END ends the restore with an error).
    async fn stop(&self, _: &StopWhy) {
        let mut stream = self.stream.lock().await;
        let activatable = stream.activatable;
        if let Some(mut stdin) = stream.stdin.take()
            && activatable
        {
            let _ = stdin.write_all(&RemusComposer::poison()).await;
            let _ = stdin.shutdown().await;
        }
        let _ = tokio::time::timeout(std::time::Duration::from_secs(10), stream.child.wait()).await;
    }

    fn guest_does(&self, _: Epoch, _: GuestDoes) {}

    async fn close(&self) {
        self.stream.lock().await.stdin.take();
    }
}
