//! Pairing over ssh: `remus pair` on one host, `remusd pair` on the other. ssh says whom we talk to, people compare fingerprints.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncWrite};

use super::message::{self, MessageError, Offer, PairMessage};
use super::service::PairingRequest;
use super::socket::ask;
use crate::api::{ApiError, ErrorCode};

/// How long the other host waits for somebody to compare fingerprints.
const COMPARING: Duration = Duration::from_secs(600);

/// The command that is run on the other host.
pub const REMOTE_COMMAND: &str = "remusd pair";

/// This host's offer.
///
/// # Errors
/// As [`ask`].
pub async fn own_offer(socket: &Path) -> Result<Offer, ApiError> {
    let value = ask(socket, &PairingRequest::Offer).await?;
    serde_json::from_value(value)
        .map_err(|error| ApiError::new(ErrorCode::Failed, format!("the daemon's offer cannot be read: {error}")))
}

/// The conversation, as seen from `remus pair`.
#[derive(Debug)]
pub struct Other<R, W> {
    /// How it is called here, for messages.
    pub name: String,
    /// From it.
    pub reader: R,
    /// To it.
    pub writer: W,
}

impl<R: AsyncBufRead + Unpin, W: AsyncWrite + Unpin> Other<R, W> {
    fn failed(&self, error: &MessageError) -> ApiError {
        ApiError::new(ErrorCode::Peer, format!("`{REMOTE_COMMAND}` on {}: {error}", self.name))
    }

    fn out_of_place(&self, message: PairMessage) -> ApiError {
        let text = match message {
            PairMessage::Failed(text) => format!("{}: {text}", self.name),
            _ => format!("{} answered out of turn; both hosts need the same remusd", self.name),
        };
        ApiError::new(ErrorCode::Peer, text)
    }

    async fn receive(&mut self) -> Result<PairMessage, ApiError> {
        message::receive(&mut self.reader).await.map_err(|error| self.failed(&error))
    }

    async fn send(&mut self, message: PairMessage) -> Result<(), ApiError> {
        message::send(&mut self.writer, &message).await.map_err(|error| self.failed(&error))
    }

    /// Its offer. Waits for ever: ssh may be asking for a password.
    ///
    /// # Errors
    /// [`ApiError`] with what it said instead.
    pub async fn offer(&mut self) -> Result<Offer, ApiError> {
        match self.receive().await? {
            PairMessage::Offer(offer) => Ok(offer),
            other => Err(self.out_of_place(other)),
        }
    }

    /// Has this host pinned there.
    ///
    /// # Errors
    /// [`ApiError`]; it has not pinned us then, or we do not know.
    pub async fn pin(&mut self, offer: Offer, address: Option<String>) -> Result<(), ApiError> {
        self.send(PairMessage::Pin { offer, address }).await?;
        match self.receive().await? {
            PairMessage::Pinned => Ok(()),
            other => Err(self.out_of_place(other)),
        }
    }

    /// Whether it reaches us by TLS; if not, why.
    ///
    /// # Errors
    /// [`ApiError`] if it does not say.
    pub async fn check(&mut self) -> Result<Option<String>, ApiError> {
        self.send(PairMessage::Check).await?;
        match self.receive().await? {
            PairMessage::Checked(why_not) => Ok(why_not),
            other => Err(self.out_of_place(other)),
        }
    }
}

/// `remusd pair`: the other host's end. `socket` is its pairing socket; `came_from` is the address from which ssh came.
///
/// # Errors
/// [`MessageError`] if the conversation breaks. What the daemon refuses is told to the other side.
pub async fn serve(
    socket: &Path,
    came_from: Option<String>,
    mut reader: impl AsyncBufRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> Result<(), MessageError> {
    match own_offer(socket).await {
        Ok(offer) => message::send(&mut writer, &PairMessage::Offer(offer)).await?,
        Err(error) => return message::send(&mut writer, &PairMessage::Failed(error.message)).await,
    }
    let mut peer = None;
    loop {
        let message = match tokio::time::timeout(COMPARING, message::receive(&mut reader)).await {
            Err(_) | Ok(Err(MessageError::End)) => break,
            Ok(message) => message?,
        };
        let answer = match (message, peer) {
            (PairMessage::Pin { offer, address }, None) => {
                let host = offer.host;
                let name = offer.name.clone();
                let address = address.or_else(|| came_from.clone()).unwrap_or_else(|| name.clone());
                match ask(socket, &PairingRequest::Pin { offer, name, address }).await {
                    Ok(_) => {
                        peer = Some(host);
                        PairMessage::Pinned
                    }
                    Err(error) => PairMessage::Failed(error.message),
                }
            }
            (PairMessage::Check, Some(host)) => {
                let checked = ask(socket, &PairingRequest::CheckId { host }).await;
                PairMessage::Checked(checked.err().map(|error| error.message))
            }
            _ => PairMessage::Failed("a message out of turn".into()),
        };
        message::send(&mut writer, &answer).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
