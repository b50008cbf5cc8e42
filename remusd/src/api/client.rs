//! The client's end of the control socket, used by `remus`.

use std::path::Path;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::types::{ApiError, ErrorCode, Reply, Request};
use super::wire::{Call as WireCall, Messages, encode};

/// Longest answer taken, in bytes: all events that are kept come in one.
const MAX_ANSWER: usize = 64 << 20;

/// One request under way.
#[derive(Debug)]
pub struct Call {
    messages: Messages<OwnedReadHalf>,
    // Held open: the daemon takes a closed connection of a foreground protection as the wish to end it.
    _write: OwnedWriteHalf,
}

impl Call {
    /// Connects and sends a request.
    ///
    /// # Errors
    /// `Failed` when no daemon listens at `socket`, `Denied` when its permissions keep us out.
    pub async fn start(socket: &Path, request: &Request) -> Result<Self, ApiError> {
        let stream = UnixStream::connect(socket).await.map_err(|e| {
            let code = match e.kind() {
                std::io::ErrorKind::PermissionDenied => ErrorCode::Denied,
                _ => ErrorCode::Failed,
            };
            ApiError::new(
                code,
                format!(
                    "No remusd answers at {}: {e}. Is the daemon running (systemctl status remusd)?",
                    socket.display()
                ),
            )
        })?;
        let (read, mut write) = stream.into_split();
        write.write_all(&encode(&WireCall::of(request))).await.map_err(|e| lost(&e))?;
        Ok(Self { messages: Messages::new(read, MAX_ANSWER), _write: write })
    }

    /// The next reply; `None` when the daemon has hung up. Cancel-safe.
    ///
    /// # Errors
    /// `Failed` when the message is not of this interface.
    pub async fn next(&mut self) -> Result<Option<Reply>, ApiError> {
        match self.messages.next().await.map_err(|_| lost(&"its answer is too long"))? {
            None => Ok(None),
            Some(message) => Reply::parse(&message).map(Some).map_err(|e| lost(&e)),
        }
    }

    /// The last reply of a request that has only one.
    ///
    /// # Errors
    /// What the daemon says, or that it hung up.
    pub async fn result(&mut self) -> Result<serde_json::Value, ApiError> {
        loop {
            match self.next().await? {
                Some(Reply::Result(value)) => return Ok(value),
                Some(Reply::Error(error)) => return Err(error),
                Some(_) => {}
                None => return Err(hung_up()),
            }
        }
    }
}

/// The daemon went away before it had answered.
#[must_use]
pub fn hung_up() -> ApiError {
    ApiError::new(ErrorCode::Failed, "remusd hung up before it had answered; see its log (journalctl -u remusd)")
}

fn lost(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("Talking to remusd failed: {error}"))
}
