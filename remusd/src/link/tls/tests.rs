//! Two hosts, real sockets; and what a stranger gets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::ids::{Generation, Nonce, ProtectionId, SessionKey};
use crate::link::codec::Encoder;
use crate::link::handshake::Incoming;
use crate::link::transport::{Connection, Transport};
use crate::link::{Frame, Hello, LinkError, LinkOptions, PrimaryLink, ProtectOffer, Purpose, RefuseCode, VersionRange};
use crate::pair::{HostId, KeyPair, Keyring, keyring::Identity};

mod link;
mod strangers;

/// A host with its keys.
struct Host {
    _folder: tempfile::TempDir,
    ring: Arc<Keyring>,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ring = Keyring::open(&folder.path().join("tls"), HostId(uuid::Uuid::new_v4())).unwrap();
        ring.own_identity().unwrap();
        Self { _folder: folder, ring }
    }

    fn identity(&self) -> Identity {
        self.ring.identity().unwrap()
    }

    /// Pins another host, reached at this port.
    fn knows(&self, other: &Host, name: &str, port: u16) {
        let them = other.identity();
        self.ring.pair(them.id, them.current.certificate, name, "127.0.0.1", port).unwrap();
    }

    fn dial(&self, name: &str) -> Dial {
        Dial::new(self.ring.clone(), &self.ring.find(name).unwrap())
    }
}

/// A listening host; who gets in comes out of `arrived`.
struct Listening {
    host: Host,
    address: SocketAddr,
    arrived: mpsc::UnboundedReceiver<Arrived>,
    state: watch::Receiver<ListenState>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `backup` listens and knows `primary`, which knows it.
async fn pair_of_hosts(limits: Limits) -> (Host, Listening) {
    let (primary, backup) = (Host::new(), Host::new());
    backup.knows(&primary, "primary", 1);
    let listening = listening(backup, limits).await;
    primary.knows(&listening.host, "backup", listening.address.port());
    (primary, listening)
}

async fn listening(host: Host, limits: Limits) -> Listening {
    let (send, arrived) = mpsc::unbounded_channel();
    let (state_in, mut state) = watch::channel(ListenState::Off);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let task = tokio::spawn(listen(any, host.ring.clone(), limits, state_in, move |arrived| {
        let send = send.clone();
        async move {
            // The test may have ended.
            let _ = send.send(arrived);
        }
    }));
    let state_now = state.wait_for(|s| *s != ListenState::Off).await.unwrap().clone();
    let ListenState::On(address) = state_now else { panic!("{state_now:?}") };
    Listening { host, address, arrived, state, task }
}

/// Reads to the end, whatever kind of end it is; what came, or `None` if the peer still holds the connection after two seconds.
async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    match tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut bytes)).await {
        Ok(_) => Some(bytes),
        Err(_) => None,
    }
}

fn key() -> SessionKey {
    SessionKey { generation: Generation(5), nonce: Nonce::random() }
}

fn offer() -> ProtectOffer {
    ProtectOffer { protection: ProtectionId::from_u128(9), domain: "g".into(), ..ProtectOffer::example() }
}

fn query() -> Purpose {
    Purpose::Query { protection: None }
}

const PATIENCE: Duration = Duration::from_secs(5);
