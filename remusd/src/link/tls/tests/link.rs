//! A link over TLS.

use super::*;
use crate::link::session::SessionEvent;
use crate::link::{LinkEvent, QueryEntry, StopReason};

async fn open_session(
    primary: &Host,
    backup: &mut Listening,
) -> (crate::link::LinkSender, crate::link::LinkEvents, crate::link::session::Session) {
    let transport = Transport::Tls(primary.dial("backup"));
    let options = LinkOptions::default();
    let accept = async {
        let arrived = backup.arrived.recv().await.unwrap();
        assert_eq!((arrived.peer.name.as_str(), arrived.what), ("primary", Use::Link));
        let incoming = Incoming::accept(arrived.connection, PATIENCE).await.unwrap();
        assert_eq!(incoming.hello.purpose, Purpose::Protect(offer()));
        incoming.welcome(uuid::Uuid::nil(), false, &LinkOptions::default()).await.unwrap()
    };
    let (opened, session) = tokio::join!(PrimaryLink::connect(&transport, key(), offer(), &options), accept);
    let (sender, events) = opened.unwrap();
    (sender, events, session)
}

#[tokio::test]
async fn frames_travel_both_ways() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let (sender, mut events, mut session) = open_session(&primary, &mut backup).await;
    let config = bytes::Bytes::from(vec![b'x'; 300_000]);
    sender.config(config.clone()).await.unwrap();
    let got = loop {
        match session.events.recv().await.unwrap() {
            SessionEvent::Frame(Frame::Config(got)) => break got,
            SessionEvent::Closed(why) => panic!("{why}"),
            _ => {}
        }
    };
    assert_eq!(got, config);
    sender.stop(StopReason::Planned).unwrap();
    session.outbox.control(Frame::Stopped).unwrap();
    loop {
        match events.next().await.unwrap() {
            LinkEvent::Stopped => break,
            LinkEvent::Closed(why) => panic!("{why}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_query_is_answered() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let transport = Transport::Tls(primary.dial("backup"));
    let answer = async {
        let arrived = backup.arrived.recv().await.unwrap();
        Incoming::accept(arrived.connection, PATIENCE).await.unwrap().answer(vec![]).await.unwrap();
    };
    let options = LinkOptions::default();
    let (entries, ()) = tokio::join!(PrimaryLink::query(&transport, None, &options), answer);
    assert_eq!(entries.unwrap(), Vec::<QueryEntry>::new());
}

#[tokio::test]
async fn unpairing_ends_open_sessions_at_once_and_closes_the_port() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let (_sender, mut events, mut session) = open_session(&primary, &mut backup).await;
    let primary_id = primary.identity().id;
    assert_eq!(backup.host.ring.open_sessions(primary_id), 1);
    let (_, ended) = backup.host.ring.unpair("primary").unwrap();
    assert_eq!(ended, 1);
    let why = loop {
        match tokio::time::timeout(PATIENCE, session.events.recv()).await.unwrap().unwrap() {
            SessionEvent::Closed(why) => break why,
            _ => continue,
        }
    };
    assert!(why.to_string().contains("unpaired"), "{why}");
    loop {
        match tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            LinkEvent::Closed(_) => break,
            _ => continue,
        }
    }
    drop(session);
    tokio::time::timeout(PATIENCE, backup.state.wait_for(|s| *s == ListenState::Off)).await.unwrap().unwrap();
    assert!(TcpStream::connect(backup.address).await.is_err(), "nobody is paired, nothing listens");
    let error = PrimaryLink::connect(&Transport::Tls(primary.dial("backup")), key(), offer(), &LinkOptions::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("remus peers"), "{error}");
    while backup.host.ring.open_sessions(primary_id) > 0 {
        tokio::task::yield_now().await;
    }
}

/// A relay that hands over to `meddle` each piece of ciphertext that the dialling side sends.
async fn relay(
    to: SocketAddr,
    meddle: impl Fn(usize, Vec<u8>) -> Vec<u8> + Send + 'static,
) -> (SocketAddr, Arc<std::sync::Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let record = seen.clone();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(to).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        // One TLS record after the other (RFC 8446, 5.1: type, version, length).
        for n in 0.. {
            let mut piece = vec![0; 5];
            if from_client.read_exact(&mut piece).await.is_err() {
                return;
            }
            let length = usize::from(u16::from_be_bytes([piece[3], piece[4]]));
            piece.resize(5 + length, 0);
            if from_client.read_exact(&mut piece[5..]).await.is_err() {
                return;
            }
            record.lock().unwrap().extend_from_slice(&piece);
            if to_server.write_all(&meddle(n, piece)).await.is_err() {
                return;
            }
        }
    });
    (address, seen)
}

/// Redirects the primary to a relay.
fn redirect(primary: &Host, backup: &Listening, to: SocketAddr) {
    primary.ring.unpair("backup").unwrap();
    primary.knows(&backup.host, "backup", to.port());
}

#[tokio::test]
async fn a_recorded_session_that_is_replayed_gets_nothing() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let (through, seen) = relay(backup.address, |_, piece| piece).await;
    redirect(&primary, &backup, through);
    let (sender, ..) = open_session(&primary, &mut backup).await;
    sender.config(bytes::Bytes::from_static(b"{}")).await.unwrap();
    drop(sender);
    let recorded = seen.lock().unwrap().clone();
    assert!(recorded.len() > 500, "the handshake was recorded");
    let mut replay = TcpStream::connect(backup.address).await.unwrap();
    replay.write_all(&recorded).await.unwrap();
    assert!(rest(&mut replay).await.is_some(), "hung up");
    assert!(backup.arrived.try_recv().is_err(), "nobody has arrived");
}

/// Damages the stream after the handshake and expects the backup's session to end without a further frame.
async fn damaged(meddle: impl Fn(usize, Vec<u8>) -> Vec<u8> + Send + 'static) {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let (through, _) = relay(backup.address, meddle).await;
    redirect(&primary, &backup, through);
    let (sender, _events, mut session) = open_session(&primary, &mut backup).await;
    // Big enough for many records; nothing of them may come out.
    let _ = sender.config(bytes::Bytes::from(vec![b'x'; 300_000])).await;
    loop {
        match tokio::time::timeout(PATIENCE, session.events.recv()).await.unwrap().unwrap() {
            SessionEvent::Closed(why) => {
                assert!(why.to_string().contains("decrypt"), "{why}");
                return;
            }
            SessionEvent::Frame(Frame::Config(_)) => panic!("a damaged frame came through"),
            _ => {}
        }
    }
}

/// The record from which on a session is open: the client's part of the handshake and its HELLO lie before.
const OPEN: usize = 6;

#[tokio::test]
async fn repeated_records_end_the_session() {
    damaged(|n, piece| if n == OPEN { [piece.clone(), piece].concat() } else { piece }).await;
}

#[tokio::test]
async fn a_missing_record_ends_the_session() {
    damaged(|n, piece| if n == OPEN { Vec::new() } else { piece }).await;
}

#[tokio::test]
async fn a_changed_bit_ends_the_session() {
    damaged(|n, mut piece| {
        if n == OPEN {
            piece[20] ^= 1;
        }
        piece
    })
    .await;
}

#[tokio::test]
async fn reordered_records_end_the_session() {
    let held = std::sync::Mutex::new(Vec::new());
    damaged(move |n, piece| {
        let mut held = held.lock().unwrap();
        match n {
            OPEN => {
                *held = piece;
                Vec::new()
            }
            n if n == OPEN + 1 => [piece, std::mem::take(&mut *held)].concat(),
            _ => piece,
        }
    })
    .await;
}

#[tokio::test]
async fn the_socket_is_set_up_for_a_link() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let tcp = TcpStream::connect(backup.address).await.unwrap();
    super::super::socket::prepare(&tcp).unwrap();
    let socket = socket2::SockRef::from(&tcp);
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_notsent_lowat().unwrap(), 128 * 1024);
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(20)));
    drop((primary, tcp, backup.arrived.try_recv()));
}

#[tokio::test]
async fn a_heartbeat_does_not_wait_for_pages_that_the_network_does_not_take() {
    // A peer that stops reading: what was written before the heartbeat is at most what TCP has on its way and the bound.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    super::super::socket::prepare(&sender).unwrap();
    let (receiver, _) = listener.accept().await.unwrap();
    let piece = vec![0; 64 * 1024];
    let mut taken = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(300), sender.write(&piece)).await {
        taken += written.unwrap();
    }
    let unread = rustix::io::ioctl_fionread(&receiver).unwrap() as usize;
    assert!(taken - unread <= 128 * 1024 + piece.len(), "{taken} taken, of which {unread} have arrived");
}
