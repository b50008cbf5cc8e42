use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::BufReader;
use tokio::sync::watch;

use super::*;
use crate::link::tls::ListenState;
use crate::pair::{HostId, Keyring, Pairing};

struct Host {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    keyring: Arc<Keyring>,
}

async fn host() -> Host {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("pair.sock");
    let keyring = Keyring::open(&folder.path().join("tls"), HostId(uuid::Uuid::new_v4())).unwrap();
    let (_, listening) = watch::channel(ListenState::Off);
    let pairing = Pairing { keyring: keyring.clone(), port: 7, listening };
    let listener = super::super::socket::listen(&socket).await.unwrap();
    tokio::spawn(super::super::socket::serve(listener, Ok(Arc::new(pairing))));
    Host { _folder: folder, socket, keyring }
}

#[tokio::test]
async fn two_hosts_learn_each_others_certificate() {
    let (a, b) = (host().await, host().await);
    let (here, there) = tokio::io::duplex(4096);
    let socket = b.socket.clone();
    let remote = tokio::spawn(async move {
        let (read, write) = tokio::io::split(there);
        serve(&socket, Some("10.0.0.1".into()), BufReader::new(read), write).await
    });
    let (read, write) = tokio::io::split(here);
    let mut other = Other { name: "hostb".into(), reader: BufReader::new(read), writer: write };
    let theirs = other.offer().await.unwrap();
    assert_eq!(theirs.certificate, b.keyring.identity().unwrap().current.certificate);
    let ours = Offer { name: "hosta".into(), ..own_offer(&a.socket).await.unwrap() };
    assert_eq!(b.keyring.peers(), [], "nothing is pinned before somebody has compared");
    other.pin(ours.clone(), None).await.unwrap();
    let pinned = b.keyring.find("hosta").unwrap();
    assert_eq!((pinned.id, pinned.address.as_str(), pinned.port), (ours.host, "10.0.0.1", 7));
    assert_eq!(pinned.fingerprint(), a.keyring.fingerprint());
    let why_not = other.check().await.unwrap().expect("nothing listens there");
    assert!(why_not.contains("10.0.0.1") || why_not.contains("hosta"), "{why_not}");
    // A second host in the same conversation is out of turn.
    let error = other.pin(ours, None).await.unwrap_err();
    assert!(error.message.contains("out of turn"), "{error}");
    drop(other);
    remote.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_a_daemon_refuses_is_told_to_the_other_side() {
    let b = host().await;
    let (here, there) = tokio::io::duplex(4096);
    let socket = b.socket.clone();
    tokio::spawn(async move {
        let (read, write) = tokio::io::split(there);
        serve(&socket, None, BufReader::new(read), write).await
    });
    let (read, write) = tokio::io::split(here);
    let mut other = Other { name: "hostb".into(), reader: BufReader::new(read), writer: write };
    let theirs = other.offer().await.unwrap();
    let error = other.pin(theirs, None).await.unwrap_err();
    assert!(error.message.contains("own identity"), "{error}");
}

#[tokio::test]
async fn without_a_daemon_there_both_sides_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut answer = Vec::new();
    serve(&folder.path().join("none"), None, BufReader::new(&b""[..]), &mut answer).await.unwrap();
    let mut other = Other { name: "hostb".into(), reader: BufReader::new(&answer[..]), writer: Vec::new() };
    let error = other.offer().await.unwrap_err();
    assert!(error.message.starts_with("hostb: No remusd answers"), "{error}");
    // What a login script prints is no offer.
    let mut other = Other { name: "hostb".into(), reader: BufReader::new(&b"Welcome!\n"[..]), writer: Vec::new() };
    assert!(other.offer().await.unwrap_err().message.contains("not a message"));
}
