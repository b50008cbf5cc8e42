//! The client's end of the control socket, used by `remus`.

use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::types::{API_VERSION, ApiError, Envelope, ErrorCode, Reply, Request};

/// One request under way.
#[derive(Debug)]
pub struct Call {
    lines: Lines<BufReader<OwnedReadHalf>>,
    // Held open: the daemon takes a closed connection of a foreground protection as the wish to end it.
    _write: OwnedWriteHalf,
}

impl Call {
    /// Connects and sends a request.
    ///
    /// # Errors
    /// `Failed` when no daemon listens at `socket`, `Denied` when its permissions keep us out.
    pub async fn start(socket: &Path, request: Request) -> Result<Self, ApiError> {
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
        let mut line = serde_json::to_vec(&Envelope { version: API_VERSION, request }).map_err(|e| lost(&e))?;
        line.push(b'\n');
        write.write_all(&line).await.map_err(|e| lost(&e))?;
        Ok(Self { lines: BufReader::new(read).lines(), _write: write })
    }

    /// The next line of the answer; `None` when the daemon has hung up.
    ///
    /// # Errors
    /// `Failed` when the connection breaks or the line is not of this interface.
    pub async fn next(&mut self) -> Result<Option<Reply>, ApiError> {
        match self.lines.next_line().await.map_err(|e| lost(&e))? {
            None => Ok(None),
            Some(line) => serde_json::from_str(&line).map(Some).map_err(|e| lost(&e)),
        }
    }
}

fn lost(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("Talking to remusd failed: {error}"))
}
