//! Where others arrive: the control socket, the link socket, and TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::api::{access, server};
use crate::backup::Registry;
use crate::config::Config;
use crate::link::tls::{self, Arrived, Limits, ListenState, Use};
use crate::link::transport::Connection;
use crate::pair::{Keyring, Pairing, rotate};

/// Listens for the command line. Members of the configured group reach the socket, and may read; without such a group only root does.
///
/// # Errors
/// When another daemon answers there, or the socket cannot be made.
pub(super) async fn control(path: &Path, group: Option<&str>) -> anyhow::Result<UnixListener> {
    let listener = server::listen(path).await.with_context(|| format!("cannot listen at {}", path.display()))?;
    // What a daemon has to recover does not wait for a group.
    if let Some(Err(error)) = group.map(|name| open_to(path, Some(name))) {
        tracing::error!("{} stays root's alone: {error:#}", path.display());
    }
    Ok(listener)
}

/// Gives the socket to a group, or to root's.
///
/// # Errors
/// When there is no such group, or the socket is gone.
pub(super) fn open_to(path: &Path, name: Option<&str>) -> anyhow::Result<()> {
    let gid = match name {
        Some(name) => access::group(name).map_err(anyhow::Error::msg).context("control.group")?,
        None => 0,
    };
    // The folder too, or its members could not get as far as the socket.
    for path in [Some(path), path.parent()].into_iter().flatten() {
        let chown = nix::unistd::chown(path, None, Some(nix::unistd::Gid::from_raw(gid)));
        chown.with_context(|| format!("cannot chgrp {}", path.display()))?;
    }
    Ok(())
}

/// Listens for links that ssh brings. Root's alone: what arrives there acts with root's authority.
///
/// # Errors
/// When the socket cannot be made.
pub(super) async fn link(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listener = server::listen(path).await.with_context(|| format!("cannot listen at {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves links that ssh brought, for ever.
pub(super) async fn serve_links(listener: UnixListener, backups: Arc<Registry>) {
    server::accept_each(listener, "link socket", |stream: UnixStream| {
        let backups = backups.clone();
        async move {
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == nix::unistd::geteuid().as_raw() => {}
                other => return tracing::warn!("refused a link of {other:?}"),
            }
            if let Err(error) = backups.serve(Connection::new(stream)).await {
                tracing::warn!("a peer that arrived: {error}");
            }
        }
    })
    .await;
}

/// Listens for paired hosts, for ever, in a task of its own.
pub(super) fn tls(config: &Config, keyring: Arc<Keyring>, backups: Arc<Registry>) -> Pairing {
    let address = SocketAddr::new(config.listen.address, config.listen.port);
    let (state, listening) = watch::channel(ListenState::Off);
    let ring = keyring.clone();
    tokio::spawn(tls::listen(address, keyring.clone(), Limits::default(), state, move |arrived: Arrived| {
        let (backups, keyring) = (backups.clone(), ring.clone());
        async move {
            match arrived.what {
                Use::Keys => rotate::answer(&keyring, arrived).await,
                Use::Link => {
                    if let Err(error) = backups.serve_party(arrived.connection, Some(arrived.peer.id)).await {
                        tracing::warn!(peer = arrived.peer.name, "a peer that arrived: {error}");
                    }
                }
            }
        }
    }));
    Pairing { keyring, port: config.listen.port, listening }
}
