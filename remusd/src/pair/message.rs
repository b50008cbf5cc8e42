//! What is said in pairing and about keys: one JSON object a line (docs/pairing.md).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::certificate::{Certificate, HostId};

/// Longest line that is taken, in bytes.
pub const MAX_LINE: usize = 16 * 1024;

/// Version of this conversation.
pub const VERSION: u32 = 1;

/// What is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Too long, or the end came before the line's end.
    #[error("a message is one line of at most {MAX_LINE} bytes; what came is {0}")]
    Line(&'static str),
    /// The other side has ended the conversation.
    #[error("the other side hung up")]
    End,
    /// Not ours.
    #[error(
        "not a message of this conversation ({0}); both hosts need the same remusd, and nothing else may print there"
    )]
    Format(String),
}

/// What a host shows of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Offer {
    /// [`VERSION`].
    pub version: u32,
    /// Its identity.
    pub host: HostId,
    /// What it calls itself.
    pub name: String,
    /// Its certificate.
    pub certificate: Certificate,
    /// TCP port of its remusd.
    pub port: u16,
}

/// What `remus pair` and `remusd pair` on the other host say, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum PairMessage {
    /// The other host: this is me.
    Offer(Offer),
    /// `remus pair`: this is me, pin me.
    Pin {
        /// Who.
        offer: Offer,
        /// Where it is reached; without it, whence its ssh came.
        address: Option<String>,
    },
    /// The other host: you are pinned.
    Pinned,
    /// `remus pair`: can you reach me by TLS?
    Check,
    /// The other host: yes, or why not.
    Checked(Option<String>),
    /// The other host: it did not work.
    Failed(String),
}

/// A question over TLS, about the keys of whoever asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum KeysRequest {
    /// Are we paired?
    Ping,
    /// Accept this certificate of mine too.
    Announce(Certificate),
    /// From now on accept only the certificate of this session.
    Retire,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum KeysAnswer {
    /// Done, durably.
    Done,
    /// No, and why.
    Refused(String),
}

/// Understands a line, with or without its end.
///
/// # Errors
/// [`MessageError`].
pub fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, MessageError> {
    if line.len() > MAX_LINE {
        return Err(MessageError::Line("longer"));
    }
    serde_json::from_slice(line).map_err(|error| MessageError::Format(error.to_string()))
}

/// Reads a line. Waits for ever: the caller sets the deadline.
///
/// # Errors
/// [`MessageError`].
pub async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncBufRead + Unpin)) -> Result<T, MessageError> {
    parse(&line(from, MAX_LINE).await?)
}

/// Reads what this host's own daemon answers, which may be a long list.
///
/// # Errors
/// [`MessageError`].
pub(super) async fn receive_from_daemon<T: DeserializeOwned>(
    from: &mut (impl AsyncBufRead + Unpin),
) -> Result<T, MessageError> {
    let line = line(from, 16 << 20).await?;
    serde_json::from_slice(&line).map_err(|error| MessageError::Format(error.to_string()))
}

async fn line(from: &mut (impl AsyncBufRead + Unpin), limit: usize) -> Result<Vec<u8>, MessageError> {
    let mut line = Vec::new();
    from.take(limit as u64 + 1).read_until(b'\n', &mut line).await?;
    match line.last() {
        Some(b'\n') => Ok(line),
        None => Err(MessageError::End),
        Some(_) if line.len() > limit => Err(MessageError::Line("longer")),
        Some(_) => Err(MessageError::Line("cut off")),
    }
}

/// Writes a line.
///
/// # Errors
/// [`MessageError::Io`].
pub async fn send(to: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> Result<(), MessageError> {
    let mut line = serde_json::to_vec(message).map_err(|error| MessageError::Format(error.to_string()))?;
    line.push(b'\n');
    to.write_all(&line).await?;
    Ok(to.flush().await?)
}

#[cfg(test)]
mod tests {
    use tokio::io::BufReader;

    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_whole() {
        let receive = async |bytes: &[u8]| receive::<KeysRequest>(&mut BufReader::new(bytes)).await;
        assert_eq!(receive(b"\"ping\"\nrest").await.unwrap(), KeysRequest::Ping);
        for (bytes, word) in [
            (&b""[..], "hung up"),
            (b"\"ping\"", "cut off"),
            (&[b' '; 2 * MAX_LINE], "longer"),
            (b"{}\n", "not a message"),
        ] {
            let error = receive(bytes).await.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(parse::<KeysRequest>(br#"{"announce":"AAAA","more":1}"#).is_err());
        assert!(parse::<PairMessage>(br#"{"pin":{"offer":{}}}"#).is_err());
        assert_eq!(parse::<PairMessage>(br#"{"checked":null}"#).unwrap(), PairMessage::Checked(None));
    }
}
