//! Questions about keys over TLS: is the pairing good, here is my next certificate, forget my old one.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::BufReader;

use super::certificate::Fingerprint;
use super::keyring::{Keyring, KeyringError};
use super::message::{self, KeysAnswer, KeysRequest};
use super::peer::Peer;
use crate::link::tls::{Arrived, Dial};

/// Most time for a question and its answer, beyond the handshake's.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks a peer. The text says what went wrong, for the operator.
///
/// # Errors
/// That text.
pub async fn ask(keyring: &Arc<Keyring>, peer: &Peer, question: &KeysRequest) -> Result<(), String> {
    let mut connection = Dial::new(keyring.clone(), peer).open_for_keys().await.map_err(|error| error.to_string())?;
    let talk = async {
        message::send(&mut connection.writer, question).await?;
        message::receive(&mut BufReader::new(&mut connection.reader)).await
    };
    match tokio::time::timeout(PATIENCE, talk).await {
        Ok(Ok(KeysAnswer::Done)) => Ok(()),
        Ok(Ok(KeysAnswer::Refused(text))) => Err(format!("{} refuses: {text}", peer.name)),
        // In TLS 1.3 a refused certificate shows only now.
        Ok(Err(error)) => Err(format!(
            "{} was reached but does not accept this host ({error}); `remus peers` there tells whether it is paired, `remus pair {}` \
             here pairs again",
            peer.name, peer.name
        )),
        Err(_) => Err(format!("{} gave no answer within {} s", peer.name, PATIENCE.as_secs())),
    }
}

/// Answers a peer's question; it may only ask about its own keys.
pub async fn answer(keyring: &Keyring, arrived: Arrived) {
    let Arrived { peer, certificate, mut connection, .. } = arrived;
    let talk = async {
        let question = message::receive(&mut BufReader::new(&mut connection.reader)).await?;
        let done = match question {
            KeysRequest::Ping => Ok(()),
            KeysRequest::Announce(next) => {
                let fingerprint = next.fingerprint();
                keyring.announced(peer.id, &certificate, next).inspect(|()| {
                    tracing::info!(peer = peer.name, %fingerprint, "a peer announced its next certificate");
                })
            }
            KeysRequest::Retire => keyring.retired(peer.id, &certificate),
        };
        let answer = match done {
            Ok(()) => KeysAnswer::Done,
            Err(error) => KeysAnswer::Refused(error.to_string()),
        };
        message::send(&mut connection.writer, &answer).await
    };
    match tokio::time::timeout(PATIENCE, talk).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(peer = peer.name, "a question about keys: {error}"),
        Err(_) => tracing::warn!(peer = peer.name, "a question about keys did not come to its end"),
    }
}

/// How far a rotation came.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Rotation {
    /// Whether the new key is in use.
    pub switched: bool,
    /// The new key's certificate.
    pub fingerprint: Fingerprint,
    /// Peers that do not know the new certificate, and why.
    pub unaware: Vec<(String, String)>,
    /// Peers that know it but could not be told to forget the old one; they do so by themselves a day after they have seen the new.
    pub unretired: Vec<(String, String)>,
}

/// Changes this host's key pair: tells all peers the new certificate, which they accept beside the old one, and when all know it
/// (or `force`) uses it and has the old one forgotten. Until then the old one stays in use, and the next call goes on.
///
/// # Errors
/// [`KeyringError`] if keys cannot be made or saved.
pub async fn rotate(keyring: &Arc<Keyring>, force: bool) -> Result<Rotation, KeyringError> {
    let next = keyring.next_key()?.certificate;
    let peers = keyring.peers();
    let unaware = ask_each(keyring, &peers, &KeysRequest::Announce(next.clone())).await;
    let mut rotation = Rotation { switched: false, fingerprint: next.fingerprint(), unaware, unretired: Vec::new() };
    if rotation.unaware.is_empty() || force {
        keyring.switch()?;
        rotation.switched = true;
        let aware: Vec<_> =
            peers.into_iter().filter(|peer| rotation.unaware.iter().all(|(name, _)| *name != peer.name)).collect();
        rotation.unretired = ask_each(keyring, &aware, &KeysRequest::Retire).await;
    }
    Ok(rotation)
}

async fn ask_each(keyring: &Arc<Keyring>, peers: &[Peer], question: &KeysRequest) -> Vec<(String, String)> {
    let asked = peers.iter().map(|peer| async { (peer.name.clone(), ask(keyring, peer, question).await) });
    futures::future::join_all(asked).await.into_iter().filter_map(|(name, r)| Some((name, r.err()?))).collect()
}
