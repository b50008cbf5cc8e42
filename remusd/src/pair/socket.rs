//! The pairing socket, `pair.sock` beside the control socket: root's alone, one request and one answer a connection. Apart from the
//! control API, because who decides whom this host trusts is nobody's but root's business, whatever others may ask for there.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};

use super::message;
use super::service::{Pairing, PairingRequest};
use crate::api::{ApiError, ErrorCode, server};

/// Most time for a request to come in once connected.
const PATIENCE: Duration = Duration::from_secs(5);

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Done(Value),
    Failed { code: ErrorCode, message: String },
}

/// Where it is, given the control socket.
#[must_use]
pub fn beside(control: &Path) -> PathBuf {
    control.with_file_name("pair.sock")
}

/// Asks this host's daemon.
///
/// # Errors
/// [`ApiError`]: the daemon's, or that it is not reached.
pub async fn ask(socket: &Path, request: &PairingRequest) -> Result<Value, ApiError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::PermissionDenied => ErrorCode::Denied,
            _ => ErrorCode::Failed,
        };
        let hint = match code {
            ErrorCode::Denied => "Only root may do this",
            _ => "Is the daemon running (systemctl status remusd)?",
        };
        ApiError::new(code, format!("No remusd answers at {}: {error}. {hint}", socket.display()))
    })?;
    let (read, mut write) = stream.into_split();
    let talk = async {
        message::send(&mut write, request).await?;
        message::receive_from_daemon(&mut BufReader::new(read)).await
    };
    match talk.await {
        Ok(Answer::Done(value)) => Ok(value),
        Ok(Answer::Failed { code, message }) => Err(ApiError::new(code, message)),
        Err(error) => Err(ApiError::new(ErrorCode::Failed, format!("Talking to remusd failed: {error}"))),
    }
}

/// Listens at `path` (mode 0600).
///
/// # Errors
/// When another daemon answers there, or the socket cannot be made.
pub async fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let listener = server::listen(path).await?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves requests for ever. `Err` in the place of the pairing is why there is none, and the answer to everything.
pub async fn serve(listener: UnixListener, pairing: Result<Arc<Pairing>, String>) {
    server::accept_each(listener, "pairing socket", |stream| {
        let pairing = pairing.clone();
        async move {
            if let Err(error) = connection(stream, pairing).await {
                tracing::debug!("pairing connection: {error}");
            }
        }
    })
    .await;
}

async fn connection(stream: UnixStream, pairing: Result<Arc<Pairing>, String>) -> Result<(), message::MessageError> {
    let caller = stream.peer_cred()?;
    let (read, mut write) = stream.into_split();
    let request = tokio::time::timeout(PATIENCE, message::receive(&mut BufReader::new(read)))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    let acts = !matches!(request, PairingRequest::Peers | PairingRequest::Offer);
    let ours = caller.uid() == nix::unistd::geteuid().as_raw();
    if acts && ours {
        tracing::info!(uid = caller.uid(), pid = caller.pid(), ?request, "asked to act");
    }
    let done = match pairing {
        _ if !ours => Err(ApiError::new(ErrorCode::Denied, "Only root may do this")),
        Ok(pairing) => pairing.handle(request).await,
        Err(why) => Err(ApiError::new(ErrorCode::Failed, why)),
    };
    let answer = match done {
        Ok(value) => Answer::Done(value),
        Err(error) => Answer::Failed { code: error.code, message: error.message },
    };
    message::send(&mut write, &answer).await
}
