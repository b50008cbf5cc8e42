//! What strangers, former peers and liars get: nothing.

use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::*;

/// Accepts any certificate: strangers have no scruples.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

struct Client<'a> {
    versions: &'a [&'static rustls::SupportedProtocolVersion],
    own: Option<&'a KeyPair>,
    alpn: &'a [u8],
}

const TLS13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

impl Client<'_> {
    /// Connects, says HELLO, and returns what comes back before the connection ends.
    async fn gets(&self, to: &Listening) -> Vec<u8> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(self.versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone));
        let mut config = match self.own {
            None => config.with_no_client_auth(),
            Some(own) => config.with_client_auth_cert(vec![own.certificate.der().clone()], own.private_key()).unwrap(),
        };
        config.alpn_protocols = if self.alpn.is_empty() { vec![] } else { vec![self.alpn.to_vec()] };
        let tcp = TcpStream::connect(to.address).await.unwrap();
        let name = crate::pair::certificate::server_name(to.host.identity().id);
        let Ok(mut tls) = TlsConnector::from(Arc::new(config)).connect(name, tcp).await else { return Vec::new() };
        let mut bytes = BytesMut::new();
        let hello = Hello {
            versions: VersionRange::OURS,
            capabilities: 0,
            software: "x".into(),
            host: "x".into(),
            purpose: query(),
        };
        Encoder::new(key()).encode(&Frame::Hello(hello), &mut bytes).unwrap();
        let _ = tls.write_all(&bytes).await;
        rest(&mut tls).await.expect("the connection ends")
    }
}

/// Nothing came back and nobody has arrived; the known peer still gets in.
async fn got_nothing(bytes: &[u8], primary: &Host, backup: &mut Listening) {
    assert_eq!(bytes, b"");
    assert!(backup.arrived.try_recv().is_err());
    still_serves(primary, backup).await;
}

async fn still_serves(primary: &Host, backup: &mut Listening) {
    let dial = primary.dial("backup");
    let (connection, arrived) = tokio::join!(dial.open(), tokio::time::timeout(PATIENCE, backup.arrived.recv()));
    connection.unwrap();
    assert_eq!(arrived.expect("in time").unwrap().peer.id, primary.identity().id);
}

#[tokio::test]
async fn an_unknown_certificate_and_none() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let stranger = Host::new().identity().current;
    for own in [Some(&stranger), None] {
        let bytes = Client { versions: TLS13, own, alpn: Use::Link.alpn() }.gets(&backup).await;
        got_nothing(&bytes, &primary, &mut backup).await;
    }
}

#[tokio::test]
async fn a_strangers_certificate_in_a_peers_name() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    // Names the known host, but is not the pinned one.
    let forged = KeyPair::generate(primary.identity().id).unwrap();
    let bytes = Client { versions: TLS13, own: Some(&forged), alpn: Use::Link.alpn() }.gets(&backup).await;
    got_nothing(&bytes, &primary, &mut backup).await;
}

#[tokio::test]
async fn tls_1_2() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let own = primary.identity().current;
    let versions: &[&_] = &[&rustls::version::TLS12];
    let bytes = Client { versions, own: Some(&own), alpn: Use::Link.alpn() }.gets(&backup).await;
    got_nothing(&bytes, &primary, &mut backup).await;
    // The same with 1.3 gets in: it was the version.
    let client = Client { versions: TLS13, own: Some(&own), alpn: Use::Link.alpn() };
    let in_session = async {
        while backup.host.ring.open_sessions(primary.identity().id) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        bytes = client.gets(&backup) => panic!("{bytes:?}"),
        () = in_session => {}
    }
}

#[tokio::test]
async fn no_or_another_purpose() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let own = primary.identity().current;
    for alpn in [&b""[..], b"http/1.1", b"remus-link/0"] {
        let bytes = Client { versions: TLS13, own: Some(&own), alpn }.gets(&backup).await;
        got_nothing(&bytes, &primary, &mut backup).await;
    }
}

#[tokio::test]
async fn an_expired_certificate() {
    let backup = Host::new();
    let id = HostId(uuid::Uuid::new_v4());
    let expired = KeyPair::until(id, SystemTime::now() - Duration::from_secs(60)).unwrap();
    let good = Host::new();
    backup.knows(&good, "good", 1);
    backup.ring.pair(id, expired.certificate.clone(), "old", "127.0.0.1", 1).unwrap();
    let mut backup = listening(backup, Limits::default()).await;
    good.knows(&backup.host, "backup", backup.address.port());
    let bytes = Client { versions: TLS13, own: Some(&expired), alpn: Use::Link.alpn() }.gets(&backup).await;
    got_nothing(&bytes, &good, &mut backup).await;
}

#[tokio::test]
async fn a_retired_certificate_and_a_revoked_one() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let (id, old) = (primary.identity().id, primary.identity().current);
    let next = primary.ring.next_key().unwrap();
    backup.host.ring.announced(id, &old.certificate, next.certificate.clone()).unwrap();
    // Old and new are both good until the old one is retired.
    still_serves(&primary, &mut backup).await;
    primary.ring.switch().unwrap();
    still_serves(&primary, &mut backup).await;
    backup.host.ring.retired(id, &next.certificate).unwrap();
    let client = Client { versions: TLS13, own: Some(&old), alpn: Use::Link.alpn() };
    got_nothing(&client.gets(&backup).await, &primary, &mut backup).await;
    // Another host stays paired, so that the port stays open.
    let other = Host::new();
    backup.host.knows(&other, "other", 1);
    other.knows(&backup.host, "backup", backup.address.port());
    backup.host.ring.unpair("primary").unwrap();
    let client = Client { versions: TLS13, own: Some(&next), alpn: Use::Link.alpn() };
    got_nothing(&client.gets(&backup).await, &other, &mut backup).await;
}

#[tokio::test]
async fn a_server_that_is_not_the_pinned_host() {
    let (primary, backup) = pair_of_hosts(Limits::default()).await;
    // Another paired host at the backup's address: paired is not enough.
    let impostor = Host::new();
    impostor.knows(&primary, "primary", 1);
    let mut impostor = listening(impostor, Limits::default()).await;
    primary.ring.unpair("backup").unwrap();
    primary.knows(&impostor.host, "impostor", 1);
    primary.knows(&backup.host, "backup", impostor.address.port());
    let error = primary.dial("backup").open().await.unwrap_err();
    assert!(matches!(error, DialError::Handshake { .. }), "{error}");
    assert!(error.to_string().contains("remus pair backup"), "{error}");
    assert!(impostor.arrived.try_recv().is_err());
}

#[tokio::test]
async fn garbage() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let shouts: [&[u8]; 6] = [
        b"GET / HTTP/1.0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"RMUS\x01\x00\x01\x00",
        &[0; 65536],
        &[0xff; 65536],
        // A TLS record that announces more than TLS allows.
        &[22, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
    ];
    for shout in shouts {
        let mut tcp = TcpStream::connect(backup.address).await.unwrap();
        let _ = tcp.write_all(shout).await;
        let answer = rest(&mut tcp).await.expect("hung up");
        // An alert record at most.
        assert!(answer.is_empty() || (answer[0] == 21 && answer.len() == 7), "{answer:?}");
        assert!(backup.arrived.try_recv().is_err());
    }
    still_serves(&primary, &mut backup).await;
}

#[tokio::test]
async fn those_who_dawdle_are_hung_up_on() {
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let (primary, mut backup) = pair_of_hosts(limits).await;
    let mut silent = TcpStream::connect(backup.address).await.unwrap();
    let slow = async {
        let mut slow = TcpStream::connect(backup.address).await.unwrap();
        // A ClientHello, a byte at a time.
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
        let begin = std::time::Instant::now();
        for byte in hello.iter().cycle() {
            if slow.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        begin.elapsed()
    };
    let (silence, slowly) = tokio::join!(rest(&mut silent), tokio::time::timeout(PATIENCE, slow));
    assert_eq!(silence, Some(vec![]));
    assert!(slowly.unwrap() >= Duration::from_millis(200));
    still_serves(&primary, &mut backup).await;
}

#[tokio::test]
async fn a_flood_keeps_no_peer_out() {
    let limits = Limits { strangers: 8, per_address: 4, handshake: Duration::from_secs(60) };
    let (primary, mut backup) = pair_of_hosts(limits).await;
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(TcpStream::connect(backup.address).await.unwrap());
    }
    still_serves(&primary, &mut backup).await;
    // All but those within the bound, of which the peer has taken one, were hung up on.
    let mut open = 0;
    for stream in &mut flood {
        let mut byte = [0];
        if tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await.is_err() {
            open += 1;
        }
    }
    assert!(open <= 4, "{open} strangers are still held");
}

#[tokio::test]
async fn an_old_protocol_version_is_refused_in_words() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let connection = primary.dial("backup").open().await.unwrap();
    let arrived = backup.arrived.recv().await.unwrap();
    let Connection { mut reader, mut writer, .. } = connection;
    let hello = Hello {
        versions: VersionRange { min: 0, max: 0 },
        capabilities: 0,
        software: "remusd 0.0".into(),
        host: "primary".into(),
        purpose: query(),
    };
    let mut bytes = BytesMut::new();
    Encoder::new(key()).encode(&Frame::Hello(hello), &mut bytes).unwrap();
    writer.write_all(&bytes).await.unwrap();
    writer.flush().await.unwrap();
    let error = Incoming::accept(arrived.connection, PATIENCE).await.unwrap_err();
    assert!(matches!(error, LinkError::NoCommonVersion { .. }), "{error}");
    let answer = rest(&mut reader).await.expect("hung up");
    assert_eq!(u16::from_le_bytes([answer[6], answer[7]]), 3, "REFUSE");
    assert_eq!(u16::from_le_bytes([answer[56], answer[57]]), RefuseCode::Version as u16);
}

#[tokio::test]
async fn a_peer_that_announces_four_gigabytes() {
    let (primary, mut backup) = pair_of_hosts(Limits::default()).await;
    let connection = primary.dial("backup").open().await.unwrap();
    let arrived = backup.arrived.recv().await.unwrap();
    let mut writer = connection.writer;
    let hello = Hello {
        versions: VersionRange::OURS,
        capabilities: 0,
        software: "x".into(),
        host: "x".into(),
        purpose: query(),
    };
    let mut bytes = BytesMut::new();
    Encoder::new(key()).encode(&Frame::Hello(hello), &mut bytes).unwrap();
    // The length, and the header's checksum with it: only the limit stands against it.
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..52]);
    bytes[52..56].copy_from_slice(&crc.to_le_bytes());
    writer.write_all(&bytes).await.unwrap();
    writer.flush().await.unwrap();
    let error = Incoming::accept(arrived.connection, PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("4294967295 bytes, more than the 16384 allowed"), "{error}");
}
