//! The end that listens: only while some host is paired, and with a bounded number of connections that have not shown yet who they
//! are.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::stream::PeerStream;
use super::{HANDSHAKE, Use, config, socket};
use crate::link::transport::Connection;
use crate::ops::Backoff;
use crate::pair::{Certificate, Keyring, Peer};

/// How many strangers may be talked to at a time, and for how long. Beyond that the oldest gives way: an honest handshake takes
/// milliseconds, so whoever holds a place for longer is the one to go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections in their handshake.
    pub strangers: usize,
    /// Of these, from one address (an IPv6 network of 64 bits counts as one).
    pub per_address: usize,
    /// Most time for a handshake.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { strangers: 64, per_address: 16, handshake: HANDSHAKE }
    }
}

/// A peer that has shown who it is.
#[derive(Debug)]
pub struct Arrived {
    /// Who.
    pub peer: Peer,
    /// The certificate that it showed.
    pub certificate: Certificate,
    /// What for.
    pub what: Use,
    /// The stream.
    pub connection: Connection,
}

/// Whether we can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenState {
    /// No host is paired.
    Off,
    /// At this address.
    On(SocketAddr),
    /// It did not work, and is tried again.
    Failed(String),
}

/// Between attempts to listen.
const RETRY: Duration = Duration::from_secs(5);

/// Listens for as long as there are peers, for ever. `handle` gets each peer in a task of its own; `state` tells how it stands.
pub async fn listen<H, F>(
    address: SocketAddr,
    keyring: Arc<Keyring>,
    limits: Limits,
    state: watch::Sender<ListenState>,
    handle: H,
) where
    H: Fn(Arrived) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut any_peers = keyring.any_peers();
    loop {
        state.send_replace(ListenState::Off);
        if any_peers.wait_for(|any| *any).await.is_err() {
            return;
        }
        match bind(address) {
            Ok(listener) => {
                state.send_replace(listener.local_addr().map_or(ListenState::Off, ListenState::On));
                tracing::info!(%address, "listening for paired hosts");
                tokio::select! {
                    () = accept_each(&listener, &keyring, limits, handle.clone()) => {}
                    _ = any_peers.wait_for(|any| !any) => tracing::info!("no host is paired any more: not listening"),
                }
            }
            Err(error) => {
                let text = format!("cannot listen at {address}: {error}");
                tracing::error!("{text}; paired hosts cannot reach this one");
                state.send_replace(ListenState::Failed(text));
                let _ = tokio::time::timeout(RETRY, any_peers.wait_for(|any| !any)).await;
            }
        }
    }
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    // A restarted daemon must not wait for its former connections' ends to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `::` is meant to be every address, also where the sysctl bindv6only says otherwise.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

/// The next connection. What keeps it away (out of descriptors, mostly) passes without an event to wait for.
async fn accept<T, F: Future<Output = std::io::Result<T>>>(mut next: impl FnMut() -> F) -> T {
    let backoff = Backoff::endless(Duration::from_millis(10), Duration::from_secs(1));
    let mut backoff = backoff.expect("0 < first <= cap");
    loop {
        match next().await {
            Ok(accepted) => return accepted,
            Err(error) => tracing::warn!("cannot accept a connection: {error}"),
        }
        // Endless.
        let _ = backoff.wait().await;
    }
}

async fn accept_each<H, F>(listener: &TcpListener, keyring: &Arc<Keyring>, limits: Limits, handle: H)
where
    H: Fn(Arrived) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let strangers = Strangers::default();
    loop {
        let (tcp, from) = accept(|| listener.accept()).await;
        let place = strangers.enter(from.ip(), limits);
        let (keyring, handle) = (keyring.clone(), handle.clone());
        tokio::spawn(async move {
            let arrived = tokio::select! {
                () = place.gone.cancelled() => Err(std::io::Error::other("gave way to a newer connection")),
                () = tokio::time::sleep(limits.handshake) => Err(std::io::ErrorKind::TimedOut.into()),
                arrived = meet(tcp, &keyring) => arrived,
            };
            drop(place);
            match arrived {
                Ok(arrived) => handle(arrived).await,
                // For debugging only: a stranger must not be able to fill the log.
                Err(error) => tracing::debug!(%from, "not a paired host: {error}"),
            }
        });
    }
}

/// The handshake: who is it, and what does it want?
async fn meet(tcp: TcpStream, keyring: &Arc<Keyring>) -> std::io::Result<Arrived> {
    socket::prepare(&tcp)?;
    // Made anew for each: the key pair may have changed.
    let identity = keyring.identity().ok_or(std::io::ErrorKind::NotFound)?;
    let config = config::server(keyring.clone(), &identity.current).map_err(std::io::Error::other)?;
    let tls = TlsAcceptor::from(config).accept(tcp).await?;
    let (tcp, session) = tls.get_ref();
    let what = Use::of(session.alpn_protocol()).ok_or_else(|| std::io::Error::other("it did not say what for"))?;
    let certificate = session.peer_certificates().and_then(|all| all.first()).cloned();
    let certificate = Certificate::new(certificate.ok_or_else(|| std::io::Error::other("it showed no certificate"))?);
    let (peer, guard) = keyring.enter(&certificate, tcp)?;
    let connection = Connection::new(PeerStream { tls: tls.into(), session: guard });
    Ok(Arrived { peer, certificate, what, connection })
}

/// Connections in their handshake, the oldest first.
#[derive(Clone, Default)]
struct Strangers(Arc<Mutex<Vec<(IpAddr, CancellationToken)>>>);

struct Place {
    strangers: Strangers,
    gone: CancellationToken,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Marks this entry as over, so that it is the one that goes.
        self.gone.cancel();
        self.strangers.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, gone)| !gone.is_cancelled());
    }
}

impl Strangers {
    fn enter(&self, from: IpAddr, limits: Limits) -> Place {
        let from = network(from);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = all.iter().filter(|(address, _)| *address == from).count();
        let goes = if of_address >= limits.per_address {
            all.iter().position(|(address, _)| *address == from)
        } else if all.len() >= limits.strangers {
            Some(0)
        } else {
            None
        };
        if let Some(goes) = goes {
            all.remove(goes).1.cancel();
        }
        let gone = CancellationToken::new();
        all.push((from, gone.clone()));
        Place { strangers: self.clone(), gone }
    }
}

/// What counts as one address: a host has as many IPv6 addresses in its network as it likes.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let mut segments = v6.segments();
            segments[4..].fill(0);
            IpAddr::V6(segments.into())
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_keeps_connections_away_is_waited_out_ever_longer_and_not_polled() {
        let start = tokio::time::Instant::now();
        let mut tries = Vec::new();
        let got = accept(|| {
            tries.push(start.elapsed().as_millis());
            std::future::ready(match tries.len() {
                1..=4 => Err(std::io::Error::from_raw_os_error(24)),
                _ => Ok(7),
            })
        });
        assert_eq!(got.await, 7);
        assert_eq!(tries, [0, 10, 30, 70, 150]);
    }

    #[test]
    fn the_oldest_stranger_gives_way_first_of_the_same_address() {
        let limits = Limits { strangers: 3, per_address: 2, handshake: HANDSHAKE };
        let strangers = Strangers::default();
        let ip = |n: u8| IpAddr::from([10, 0, 0, n]);
        let (a, b, c) =
            (strangers.enter(ip(1), limits), strangers.enter(ip(2), limits), strangers.enter(ip(2), limits));
        let d = strangers.enter(ip(2), limits);
        assert_eq!([&a, &b, &c, &d].map(|p| p.gone.is_cancelled()), [false, true, false, false]);
        let e = strangers.enter(ip(3), limits);
        assert_eq!([&a, &c, &d, &e].map(|p| p.gone.is_cancelled()), [true, false, false, false]);
        drop((a, b, c, d, e));
        assert!(strangers.0.lock().unwrap().is_empty());
    }

    #[test]
    fn an_ipv6_network_and_a_mapped_address_count_as_one() {
        let ip = |text: &str| network(text.parse().unwrap());
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::2"));
        assert_ne!(ip("2001:db8::1"), ip("2001:db8:0:1::1"));
        assert_eq!(ip("::ffff:10.0.0.1"), ip("10.0.0.1"));
    }
}
