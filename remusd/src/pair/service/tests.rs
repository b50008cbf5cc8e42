use std::net::SocketAddr;

use super::*;
use crate::link::tls::{Limits, Use, listen};
use crate::pair::Fingerprint;

struct Host {
    _folder: tempfile::TempDir,
    pairing: Pairing,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A host that would listen at this port once it is paired.
fn host() -> Host {
    let folder = tempfile::tempdir().unwrap();
    let keyring = Keyring::open(&folder.path().join("tls"), HostId(uuid::Uuid::new_v4())).unwrap();
    let (state, listening) = watch::channel(ListenState::Off);
    let ring = keyring.clone();
    let answering = keyring.clone();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let task = tokio::spawn(listen(any, ring, Limits::default(), state, move |arrived| {
        let keyring = answering.clone();
        async move {
            assert_eq!(arrived.what, Use::Keys);
            rotate::answer(&keyring, arrived).await;
        }
    }));
    Host { _folder: folder, pairing: Pairing { keyring, port: 0, listening }, task }
}

impl Host {
    async fn ask(&self, request: PairingRequest) -> Result<Value, ApiError> {
        self.pairing.handle(request).await
    }

    async fn offer(&self) -> Offer {
        serde_json::from_value(self.ask(PairingRequest::Offer).await.unwrap()).unwrap()
    }

    async fn port(&self) -> u16 {
        let mut state = self.pairing.listening.clone();
        let ListenState::On(address) = state.wait_for(|s| *s != ListenState::Off).await.unwrap().clone() else {
            panic!("not listening")
        };
        address.port()
    }

    async fn pin(&self, name: &str, offer: Offer) {
        self.ask(PairingRequest::Pin { offer, name: name.into(), address: "127.0.0.1".into() }).await.unwrap();
    }

    fn fingerprint(&self) -> Fingerprint {
        self.pairing.keyring.fingerprint().unwrap()
    }

    fn accepts(&self, whom: &str) -> Vec<Fingerprint> {
        let peer = self.pairing.keyring.find(whom).unwrap();
        peer.pins.iter().map(|pin| pin.certificate.fingerprint()).collect()
    }
}

/// Two hosts that know each other. The port is known only once something is paired, hence twice.
async fn pair_up(a: &Host, a_name: &str, b: &Host, b_name: &str) {
    let (mut of_a, mut of_b) = (a.offer().await, b.offer().await);
    (of_a.port, of_b.port) = (1, 1);
    a.pin(b_name, of_b.clone()).await;
    b.pin(a_name, of_a.clone()).await;
    (of_a.port, of_b.port) = (a.port().await, b.port().await);
    a.pin(b_name, of_b).await;
    b.pin(a_name, of_a).await;
}

#[tokio::test]
async fn paired_hosts_reach_each_other_and_one_that_forgot_is_told() {
    let (a, b) = (host(), host());
    pair_up(&a, "a", &b, "b").await;
    a.ask(PairingRequest::Check { host: "b".into() }).await.unwrap();
    b.ask(PairingRequest::CheckId { host: a.offer().await.host }).await.unwrap();
    let peers = a.ask(PairingRequest::Peers).await.unwrap();
    assert_eq!(peers["fingerprint"], json!(a.fingerprint()));
    assert_eq!(peers["peers"][0]["name"], "b");
    assert_eq!(peers["peers"][0]["fingerprints"], json!([b.fingerprint()]));

    // b keeps listening for a third host, but knows a no more.
    let c = host();
    pair_up(&b, "b", &c, "c").await;
    b.ask(PairingRequest::Unpair { host: "a".into() }).await.unwrap();
    let error = a.ask(PairingRequest::Check { host: "b".into() }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Peer);
    assert!(error.message.contains("remus pair b"), "{error}");
    let error = b.ask(PairingRequest::Check { host: "a".into() }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn keys_change_without_a_gap() {
    let (a, b, c) = (host(), host(), host());
    pair_up(&a, "a", &b, "b").await;
    pair_up(&a, "a", &c, "c").await;
    let old = a.fingerprint();
    a.ask(PairingRequest::RotateKeys { force: false }).await.unwrap();
    let new = a.fingerprint();
    assert_ne!(old, new);
    for peer in [&b, &c] {
        assert_eq!(peer.accepts("a"), [new], "the old key is retired");
    }
    for peer in ["b", "c"] {
        a.ask(PairingRequest::Check { host: peer.into() }).await.unwrap();
    }
    b.ask(PairingRequest::Check { host: "a".into() }).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_is_off_keeps_the_old_key_in_use_until_it_is_back_or_given_up() {
    let (a, b, c) = (host(), host(), host());
    pair_up(&a, "a", &b, "b").await;
    pair_up(&a, "a", &c, "c").await;
    let old = a.fingerprint();
    let c_port = c.port().await;
    c.task.abort();
    let mut off = c.pairing.listening.clone();
    // The listener's end of the channel goes with its task.
    while off.changed().await.is_ok() {}

    let error = a.ask(PairingRequest::RotateKeys { force: false }).await.unwrap_err();
    assert!(error.message.contains("  c: ") && error.message.contains("--force"), "{error}");
    assert_eq!(a.fingerprint(), old);
    assert_eq!(b.accepts("a").len(), 2, "the overlap: both are good at b");
    a.ask(PairingRequest::Check { host: "b".into() }).await.unwrap();
    b.ask(PairingRequest::Check { host: "a".into() }).await.unwrap();
    let pending = a.ask(PairingRequest::Peers).await.unwrap()["next-fingerprint"].clone();
    assert_eq!(pending, json!(b.accepts("a")[1]));

    let done = a.ask(PairingRequest::RotateKeys { force: true }).await.unwrap();
    assert_eq!(json!(a.fingerprint()), pending, "the announced key, not a third one");
    assert_eq!(b.accepts("a"), [a.fingerprint()]);
    assert!(done["message"].as_str().unwrap().contains("paired again:\n  c: "), "{done}");
    assert_eq!(c.accepts("a"), [old]);
    assert_ne!(c_port, 0);
}

#[tokio::test]
async fn another_version_of_the_pairing_is_refused() {
    let (a, b) = (host(), host());
    let offer = Offer { version: 2, port: 1, ..b.offer().await };
    let pin = PairingRequest::Pin { offer, name: "b".into(), address: "b".into() };
    assert_eq!(a.ask(pin).await.unwrap_err().code, ErrorCode::Unsupported);
}

#[test]
fn dates() {
    // `date -u -d @SECONDS +%F`
    for (seconds, text) in
        [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (1_798_761_599, "2026-12-31"), (4_107_542_400, "2100-03-01")]
    {
        assert_eq!(date(seconds * 1000), text);
    }
}
