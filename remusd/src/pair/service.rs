//! What the daemon does about pairing when the command line asks.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::certificate::HostId;
use super::keyring::{Keyring, KeyringError};
use super::message::{self, KeysRequest, Offer};
use super::rotate;
use crate::api::{ApiError, ErrorCode};
use crate::link::tls::{Dial, ListenState};

/// What can be asked about pairing. All of it needs root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum PairingRequest {
    /// This host's offer. Makes its keys if it has none yet.
    Offer,
    /// Pin a host.
    Pin {
        /// What it showed.
        offer: Offer,
        /// What to call it here.
        name: String,
        /// Where to reach it.
        address: String,
    },
    /// Can this peer be reached by TLS, and does it accept us?
    Check {
        /// Its name.
        host: String,
    },
    /// The same, by identity.
    CheckId {
        /// Its identity.
        host: HostId,
    },
    /// Whom this host is paired with.
    Peers,
    /// Forget a host; its open sessions end.
    Unpair {
        /// Its name.
        host: String,
    },
    /// Change this host's key pair.
    RotateKeys {
        /// Also if not every peer can be told.
        #[serde(default)]
        force: bool,
    },
}

/// The pairing of this host.
#[derive(Debug)]
pub struct Pairing {
    /// Keys and peers.
    pub keyring: Arc<Keyring>,
    /// TCP port at which peers arrive.
    pub port: u16,
    /// Whether they can.
    pub listening: watch::Receiver<ListenState>,
}

impl From<KeyringError> for ApiError {
    fn from(error: KeyringError) -> Self {
        let code = match &error {
            KeyringError::NotPaired(_) => ErrorCode::NotFound,
            KeyringError::Refused(_) => ErrorCode::Conflict,
            KeyringError::File(_) | KeyringError::Make(_) => ErrorCode::Failed,
        };
        Self::new(code, error.to_string())
    }
}

fn date(ms: u64) -> String {
    let (mut days, mut year) = (ms / 86_400_000, 1970);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, days + 1)
}

impl Pairing {
    /// How to reach the peer of this name; `None` if there is none.
    #[must_use]
    pub fn dial(&self, name: &str) -> Option<(HostId, Dial)> {
        let peer = self.keyring.find(name)?;
        Some((peer.id, Dial::new(self.keyring.clone(), &peer)))
    }

    /// Does what is asked.
    ///
    /// # Errors
    /// [`ApiError`] with a sentence.
    pub async fn handle(&self, request: PairingRequest) -> Result<Value, ApiError> {
        match request {
            PairingRequest::Offer => {
                let identity = self.keyring.own_identity()?;
                let offer = Offer {
                    version: message::VERSION,
                    host: identity.id,
                    name: crate::link::handshake::host_name(),
                    certificate: identity.current.certificate,
                    port: self.port,
                };
                serde_json::to_value(offer).map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))
            }
            PairingRequest::Pin { offer, name, address } => {
                if offer.version != message::VERSION {
                    return Err(ApiError::new(
                        ErrorCode::Unsupported,
                        format!(
                            "{name} speaks version {} of the pairing, this host {}: install the same remusd on both",
                            offer.version,
                            message::VERSION
                        ),
                    ));
                }
                let fingerprint = offer.certificate.fingerprint();
                self.keyring.pair(offer.host, offer.certificate, &name, &address, offer.port)?;
                tracing::info!(name, address, port = offer.port, %fingerprint, "paired");
                Ok(json!({ "message": format!("Paired with {name}, {fingerprint}") }))
            }
            PairingRequest::Check { host } => self.check(self.keyring.find(&host), host).await,
            PairingRequest::CheckId { host } => self.check(self.keyring.peer(host), host.to_string()).await,
            PairingRequest::Peers => Ok(self.peers()),
            PairingRequest::Unpair { host } => {
                let (peer, sessions) = self.keyring.unpair(&host)?;
                tracing::info!(name = peer.name, id = %peer.id, sessions, "unpaired");
                let mut text = format!("{} is not paired any more", peer.name);
                if sessions > 0 {
                    text += &format!("; {sessions} open sessions with it were ended");
                }
                text += ". It still accepts this host: `remus unpair` there ends that";
                Ok(json!({ "message": text, "sessions": sessions }))
            }
            PairingRequest::RotateKeys { force } => self.rotate(force).await,
        }
    }

    async fn check(&self, peer: Option<super::Peer>, typed: String) -> Result<Value, ApiError> {
        let peer = peer.ok_or(KeyringError::NotPaired(typed))?;
        rotate::ask(&self.keyring, &peer, &KeysRequest::Ping)
            .await
            .map_err(|text| ApiError::new(ErrorCode::Peer, text))?;
        Ok(json!({ "message": format!("{} is reached by TLS", peer.name) }))
    }

    fn peers(&self) -> Value {
        let identity = self.keyring.identity();
        let listening = match &*self.listening.borrow() {
            ListenState::Off => "off: no host is paired".to_owned(),
            ListenState::On(address) => address.to_string(),
            ListenState::Failed(text) => text.clone(),
        };
        let peers: Vec<_> = self
            .keyring
            .peers()
            .iter()
            .map(|peer| {
                json!({
                    "name": peer.name,
                    "address": peer.address,
                    "port": peer.port,
                    "id": peer.id,
                    "fingerprints": peer.pins.iter().map(|pin| pin.certificate.fingerprint()).collect::<Vec<_>>(),
                    "paired": date(peer.paired_ms),
                    "sessions": self.keyring.open_sessions(peer.id),
                })
            })
            .collect();
        json!({
            "id": identity.as_ref().map(|i| i.id),
            "fingerprint": identity.as_ref().map(|i| i.current.certificate.fingerprint()),
            "expires": identity.as_ref().map(|i| date(i.current.expires_ms)),
            "next-fingerprint": identity.as_ref().and_then(|i| Some(i.next.as_ref()?.certificate.fingerprint())),
            "listening": listening,
            "peers": peers,
        })
    }

    async fn rotate(&self, force: bool) -> Result<Value, ApiError> {
        let rotation = rotate::rotate(&self.keyring, force).await?;
        let list =
            |all: &[(String, String)]| all.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect::<String>();
        if !rotation.switched {
            return Err(ApiError::new(
                ErrorCode::Peer,
                format!(
                    "The new key is not in use yet, because not every peer knows it:{}\nThe old one stays good. When they can be reached: \
                     `remus keys rotate` again; a host that is gone for good: `remus unpair`; or `remus keys rotate --force`, after which \
                     they must be paired again",
                    list(&rotation.unaware)
                ),
            ));
        }
        tracing::info!(fingerprint = %rotation.fingerprint, "this host's key pair was changed");
        let mut text = format!("This host's key is new: {}", rotation.fingerprint);
        if !rotation.unaware.is_empty() {
            text += &format!("\nTo be paired again:{}", list(&rotation.unaware));
        }
        if !rotation.unretired.is_empty() {
            text += &format!("\nThe old key is accepted for another day by:{}", list(&rotation.unretired));
        }
        let mut value = serde_json::to_value(&rotation).unwrap_or_default();
        value["message"] = text.into();
        Ok(value)
    }
}

#[cfg(test)]
mod tests;
