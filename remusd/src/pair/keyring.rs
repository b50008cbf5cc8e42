//! This host's keys and its peers' certificates, in memory and on disk (`identity.json` and `peers.json`, 0600).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::certificate::{Certificate, Fingerprint, HostId, KeyPair, MakeError, now_ms};
use super::files::{self, FileError};
use super::peer::{MAX_PINS, Peer, Pin, is_host};
use super::sessions::{SessionGuard, Sessions};

/// Version of both files.
const VERSION: u32 = 1;

/// Most paired hosts.
const MAX_PEERS: usize = 1000;

/// Keys or peers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key pair.
    #[error(transparent)]
    Make(#[from] MakeError),
    /// Nobody of this name.
    #[error("{0} is not paired with this host; `remus peers` lists those that are, `remus pair {0}` pairs it")]
    NotPaired(String),
    /// The pairing offer or announcement is not acceptable.
    #[error("{0}")]
    Refused(String),
}

fn refused<T>(text: impl Into<String>) -> Result<T, KeyringError> {
    Err(KeyringError::Refused(text.into()))
}

/// This host's own keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    version: u32,
    /// Who we are.
    pub id: HostId,
    /// The key pair in use.
    pub current: KeyPair,
    /// The one that peers are being told of.
    #[serde(default)]
    pub next: Option<KeyPair>,
}

/// The peers' file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeersFile {
    version: u32,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Inner {
    identity: Option<Identity>,
    peers: Vec<Peer>,
}

/// Keys, peers and their open sessions. Changes are durable before they are seen.
#[derive(Debug)]
pub struct Keyring {
    folder: PathBuf,
    id: HostId,
    inner: Mutex<Inner>,
    sessions: Sessions,
    any_peers: watch::Sender<bool>,
}

impl Keyring {
    /// Opens the folder of the host of this identity; it need not exist yet.
    ///
    /// # Errors
    /// [`KeyringError::File`] if a file is damaged, of another version or host, or open to others: nothing of it is used then.
    pub fn open(folder: &Path, id: HostId) -> Result<Arc<Self>, KeyringError> {
        let mut inner = Inner { identity: None, peers: Vec::new() };
        if folder.exists() {
            files::folder(folder)?;
            let path = folder.join("identity.json");
            let identity: Option<Identity> = files::read(&path)?;
            let path_of_peers = folder.join("peers.json");
            let peers: Option<PeersFile> = files::read(&path_of_peers)?;
            for (path, version) in
                [(path, identity.as_ref().map(|i| i.version)), (path_of_peers, peers.as_ref().map(|p| p.version))]
            {
                if let Some(version) = version.filter(|version| *version != VERSION) {
                    let text = format!("its version is {version}, this remusd knows {VERSION}");
                    return Err(FileError::Format { path, text }.into());
                }
            }
            if let Some(other) = identity.as_ref().map(|identity| identity.id).filter(|other| *other != id) {
                let text = format!("its keys are those of the host {other}, this is {id}");
                return Err(FileError::Format { path: folder.join("identity.json"), text }.into());
            }
            inner = Inner { identity, peers: peers.map(|file| file.peers).unwrap_or_default() };
        }
        let any_peers = watch::Sender::new(!inner.peers.is_empty());
        Ok(Arc::new(Self {
            folder: folder.to_owned(),
            id,
            inner: Mutex::new(inner),
            sessions: Sessions::default(),
            any_peers,
        }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whether there is any peer: without one nothing listens.
    #[must_use]
    pub fn any_peers(&self) -> watch::Receiver<bool> {
        self.any_peers.subscribe()
    }

    /// Our keys, if there are any yet.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.inner().identity.clone()
    }

    /// Our keys; made now if there are none yet.
    ///
    /// # Errors
    /// [`KeyringError`] if they cannot be made or saved.
    pub fn own_identity(&self) -> Result<Identity, KeyringError> {
        let mut inner = self.inner();
        if let Some(identity) = &inner.identity {
            return Ok(identity.clone());
        }
        files::folder(&self.folder)?;
        let id = self.id;
        let identity = Identity { version: VERSION, id, current: KeyPair::generate(id)?, next: None };
        self.save_identity(&mut inner, identity.clone())?;
        Ok(identity)
    }

    fn save_identity(&self, inner: &mut Inner, identity: Identity) -> Result<(), KeyringError> {
        files::write(&self.folder.join("identity.json"), &identity)?;
        inner.identity = Some(identity);
        Ok(())
    }

    fn save_peers(&self, inner: &mut Inner, peers: Vec<Peer>) -> Result<(), KeyringError> {
        let file = PeersFile { version: VERSION, peers };
        files::write(&self.folder.join("peers.json"), &file)?;
        inner.peers = file.peers;
        self.any_peers
            .send_if_modified(|any| std::mem::replace(any, !inner.peers.is_empty()) == inner.peers.is_empty());
        Ok(())
    }

    /// The key pair that peers are told of next; made now if there is none.
    ///
    /// # Errors
    /// [`KeyringError`].
    pub fn next_key(&self) -> Result<KeyPair, KeyringError> {
        let mut identity = self.own_identity()?;
        let mut inner = self.inner();
        if let Some(next) = inner.identity.as_ref().and_then(|identity| identity.next.clone()) {
            return Ok(next);
        }
        let next = KeyPair::generate(identity.id)?;
        identity.next = Some(next.clone());
        self.save_identity(&mut inner, identity)?;
        Ok(next)
    }

    /// Uses the next key pair from now on and forgets the former.
    ///
    /// # Errors
    /// [`KeyringError`].
    pub fn switch(&self) -> Result<(), KeyringError> {
        let mut inner = self.inner();
        match inner.identity.clone() {
            Some(Identity { version, id, next: Some(next), .. }) => {
                self.save_identity(&mut inner, Identity { version, id, current: next, next: None })
            }
            _ => Ok(()),
        }
    }

    /// All paired hosts.
    #[must_use]
    pub fn peers(&self) -> Vec<Peer> {
        self.inner().peers.clone()
    }

    /// The paired host that is called so.
    #[must_use]
    pub fn find(&self, typed: &str) -> Option<Peer> {
        self.inner().peers.iter().find(|peer| peer.is_called(typed)).cloned()
    }

    /// The paired host of this identity.
    #[must_use]
    pub fn peer(&self, id: HostId) -> Option<Peer> {
        self.inner().peers.iter().find(|peer| peer.id == id).cloned()
    }

    /// Whose certificate this is, if it is accepted now.
    #[must_use]
    pub fn whose(&self, certificate: &Certificate) -> Option<HostId> {
        let now = now_ms();
        self.inner().peers.iter().find(|peer| peer.pin(certificate, now).is_some()).map(|peer| peer.id)
    }

    /// Lists an authenticated connection. Looks again whose it is: it may have been unpaired since its handshake.
    ///
    /// # Errors
    /// When it is not accepted any more, or there are too many.
    pub fn enter(&self, certificate: &Certificate, stream: &TcpStream) -> std::io::Result<(Peer, SessionGuard)> {
        // Under the lock, so that an unpairing either sees the session or is seen here.
        let mut inner = self.inner();
        let now = now_ms();
        let Some(at) = inner.peers.iter().position(|peer| peer.pin(certificate, now).is_some()) else {
            return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, "unpaired a moment ago"));
        };
        let guard = self.sessions.enter(inner.peers[at].id, stream)?;
        let mut peer = inner.peers[at].clone();
        if peer.used(certificate, now) {
            let mut peers = inner.peers.clone();
            peers[at] = peer.clone();
            if let Err(error) = self.save_peers(&mut inner, peers) {
                tracing::error!("{error}");
            }
        }
        Ok((peer, guard))
    }

    /// Pins a host. One that is paired already gets this certificate in the place of all its former ones.
    ///
    /// # Errors
    /// [`KeyringError::Refused`] if the certificate does not name the host, is somebody else's or our own, or the name is taken.
    pub fn pair(
        &self,
        id: HostId,
        certificate: Certificate,
        name: &str,
        address: &str,
        port: u16,
    ) -> Result<(), KeyringError> {
        if !is_host(name) || !is_host(address) || port == 0 {
            return refused(format!("{name:?} at {address:?} port {port} cannot be a host"));
        }
        let own = self.own_identity()?;
        if own.id == id || own.current.certificate == certificate {
            return refused(format!(
                "{name} has this host's own identity: it is this host, or a copy of its disk. On the copy: stop remusd, remove {} \
                 and host-id beside it, pair again",
                self.folder.display()
            ));
        }
        if !certificate.names(id) {
            return refused(format!("the certificate of {name} does not name its host identity {id}"));
        }
        let mut inner = self.inner();
        let mut peers = inner.peers.clone();
        if let Some(other) =
            peers.iter().find(|p| p.id != id && p.pins.iter().any(|pin| pin.certificate == certificate))
        {
            return refused(format!("the certificate of {name} is that of {}", other.name));
        }
        if let Some(other) = peers.iter().find(|peer| peer.id != id && peer.is_called(name)) {
            return refused(format!(
                "another host ({}, identity {}) is paired as {name}; if it was reinstalled: `remus unpair {name}`, then pair again",
                other.fingerprint().map(|f| f.to_string()).unwrap_or_default(),
                other.id
            ));
        }
        peers.retain(|peer| peer.id != id);
        if peers.len() >= MAX_PEERS {
            return refused(format!("{MAX_PEERS} hosts are paired already"));
        }
        peers.push(Peer {
            id,
            name: name.into(),
            address: address.into(),
            port,
            paired_ms: now_ms(),
            pins: vec![Pin { certificate, added_ms: now_ms(), until_ms: None }],
        });
        self.save_peers(&mut inner, peers)
    }

    /// Forgets a host and ends its open sessions. Who it was, and how many sessions ended.
    ///
    /// # Errors
    /// [`KeyringError`]; it is still paired then.
    pub fn unpair(&self, typed: &str) -> Result<(Peer, usize), KeyringError> {
        let mut inner = self.inner();
        let Some(peer) = inner.peers.iter().find(|peer| peer.is_called(typed)).cloned() else {
            return Err(KeyringError::NotPaired(typed.into()));
        };
        let rest = inner.peers.iter().filter(|other| other.id != peer.id).cloned().collect();
        self.save_peers(&mut inner, rest)?;
        let ended = self.sessions.cut(peer.id);
        Ok((peer, ended))
    }

    /// Open sessions with a host.
    #[must_use]
    pub fn open_sessions(&self, id: HostId) -> usize {
        self.sessions.count(id)
    }

    fn change(&self, id: HostId, change: impl FnOnce(&mut Peer)) -> Result<(), KeyringError> {
        let mut inner = self.inner();
        let mut peers = inner.peers.clone();
        let Some(peer) = peers.iter_mut().find(|peer| peer.id == id) else {
            return Err(KeyringError::NotPaired(id.to_string()));
        };
        change(peer);
        peer.pins.truncate(MAX_PINS);
        self.save_peers(&mut inner, peers)
    }

    /// Accepts the next certificate of a peer, which it announced over a session authenticated `with` its present one.
    ///
    /// # Errors
    /// [`KeyringError::Refused`] if the certificate does not name that very host or is another one's.
    pub fn announced(&self, id: HostId, with: &Certificate, next: Certificate) -> Result<(), KeyringError> {
        if !next.names(id) {
            return refused("the announced certificate does not name the host that announces it");
        }
        if self.inner().peers.iter().any(|p| p.id != id && p.pins.iter().any(|pin| pin.certificate == next)) {
            return refused("the announced certificate is another host's");
        }
        self.change(id, |peer| peer.announce(with, next, now_ms()))
    }

    /// Accepts only the certificate with which a peer asked for that.
    ///
    /// # Errors
    /// [`KeyringError`].
    pub fn retired(&self, id: HostId, with: &Certificate) -> Result<(), KeyringError> {
        self.change(id, |peer| peer.retire_all_but(with))
    }

    /// The fingerprint of the key pair in use.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.inner().identity.as_ref().map(|identity| identity.current.certificate.fingerprint())
    }
}

#[cfg(test)]
mod tests;
