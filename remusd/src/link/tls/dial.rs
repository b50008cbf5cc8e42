//! The end that connects.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::stream::PeerStream;
use super::{HANDSHAKE, Use, config, socket};
use crate::link::transport::Connection;
use crate::pair::certificate::server_name;
use crate::pair::{Certificate, HostId, Keyring, Peer};

/// A paired host cannot be reached by TLS.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// This host's keys cannot be used.
    #[error("TLS is not available on this host: {0}")]
    Unusable(String),
    /// The pairing is gone.
    #[error("{0} is not paired with this host any more; `remus pair` pairs it")]
    NotPaired(String),
    /// No connection.
    #[error(
        "{peer} is not reached at {address} port {port}: {source}. Does remusd run there, is this host paired there (`remus peers`), and \
         does the firewall let the port through?"
    )]
    Connect {
        /// The peer's name.
        peer: String,
        /// Where it was tried.
        address: String,
        /// TCP port.
        port: u16,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No TLS.
    #[error(
        "no TLS session with {peer}: {source}. If a host was reinstalled or its keys were changed while the other was off, pair them \
         again: `remus pair {peer}`"
    )]
    Handshake {
        /// The peer's name.
        peer: String,
        /// The library's reason.
        source: std::io::Error,
    },
}

impl From<DialError> for std::io::Error {
    fn from(error: DialError) -> Self {
        let kind = match &error {
            DialError::Unusable(_) | DialError::NotPaired(_) => std::io::ErrorKind::NotFound,
            DialError::Connect { source, .. } | DialError::Handshake { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// How to reach a paired host. Its address is looked up in the keyring each time.
#[derive(Clone)]
pub struct Dial {
    /// Or why there is none.
    keyring: Result<Arc<Keyring>, String>,
    host: HostId,
    name: String,
}

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dial").field("host", &self.host).field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartialEq for Dial {
    fn eq(&self, other: &Self) -> bool {
        self.host == other.host && self.name == other.name
    }
}

impl Eq for Dial {}

impl std::fmt::Display for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

fn timed_out() -> std::io::Error {
    let text = format!("no answer within {} s", HANDSHAKE.as_secs());
    std::io::Error::new(std::io::ErrorKind::TimedOut, text)
}

impl Dial {
    /// To this peer.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, peer: &Peer) -> Self {
        Self::to(Ok(keyring), peer.id, peer.name.clone())
    }

    /// To the host of this identity, which need not be paired now, nor need there be a keyring: then opening fails.
    #[must_use]
    pub fn to(keyring: Result<Arc<Keyring>, String>, host: HostId, name: String) -> Self {
        Self { keyring, host, name }
    }

    /// Connects for a link.
    ///
    /// # Errors
    /// [`DialError`], at the latest after twice [`HANDSHAKE`].
    pub async fn open(&self) -> Result<Connection, DialError> {
        Ok(Connection::new(self.connect(Use::Link).await?))
    }

    /// Connects for a question about keys.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_for_keys(&self) -> Result<Connection, DialError> {
        Ok(Connection::new(self.connect(Use::Keys).await?))
    }

    async fn connect(&self, what: Use) -> Result<PeerStream, DialError> {
        let keyring = self.keyring.as_ref().map_err(|why| DialError::Unusable(why.clone()))?;
        let (Some(peer), Some(identity)) = (keyring.peer(self.host), keyring.identity()) else {
            return Err(DialError::NotPaired(self.name.clone()));
        };
        let unreached = |source| DialError::Connect {
            peer: self.name.clone(),
            address: peer.address.clone(),
            port: peer.port,
            source,
        };
        let failed = |source| DialError::Handshake { peer: self.name.clone(), source };
        let tcp = tokio::time::timeout(HANDSHAKE, TcpStream::connect((peer.address.as_str(), peer.port)))
            .await
            .map_err(|_| unreached(timed_out()))?
            .map_err(unreached)?;
        socket::prepare(&tcp).map_err(failed)?;
        let config = config::client(keyring.clone(), &identity.current, self.host, what)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let tls = tokio::time::timeout(HANDSHAKE, TlsConnector::from(config).connect(server_name(self.host), tcp))
            .await
            .map_err(|_| failed(timed_out()))?
            .map_err(failed)?;
        let (tcp, session) = tls.get_ref();
        let certificate = session.peer_certificates().and_then(|all| all.first()).cloned();
        let certificate = certificate.ok_or_else(|| failed(std::io::Error::other("no certificate")))?;
        let (_, guard) = keyring.enter(&Certificate::new(certificate), tcp).map_err(failed)?;
        Ok(PeerStream { tls: tls.into(), session: guard })
    }
}
