//! A host's key pair with its self-signed certificate, and the fingerprint by which people know it.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};

pub use crate::witness::HostId;

/// How long a certificate is good for. What guards it is the pin and its revocation; this only bounds forgotten ones.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The DNS name in a host's certificates. `.invalid` (RFC 6761) is no real host's.
#[must_use]
pub fn server_name(host: HostId) -> ServerName<'static> {
    ServerName::try_from(dns_name(host)).unwrap_or_else(|_| unreachable!("hexadecimal digits are a DNS label"))
}

fn dns_name(host: HostId) -> String {
    format!("{}.remus.invalid", host.0.simple())
}

/// SHA-256 of a certificate's DER form, written as OpenSSH writes key fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    fn of(der: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, der).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHA256:{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a fingerprint (SHA256: and 43 characters)");
        let bytes = STANDARD_NO_PAD.decode(text.strip_prefix("SHA256:").ok_or_else(wrong)?).map_err(|_| wrong())?;
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A certificate, in base64 of its DER form when written.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate(CertificateDer<'static>);

/// Longest certificate that is taken; ours have about 400 bytes.
const MAX_CERTIFICATE: usize = 4096;

impl Certificate {
    /// A certificate that was received.
    #[must_use]
    pub fn new(der: CertificateDer<'static>) -> Self {
        Self(der)
    }

    /// Its DER form.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.0
    }

    /// Its fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.0)
    }

    /// Whether it is a certificate at all, and names this host.
    #[must_use]
    pub fn names(&self, host: HostId) -> bool {
        ParsedCertificate::try_from(&self.0)
            .is_ok_and(|parsed| rustls::client::verify_server_name(&parsed, &server_name(host)).is_ok())
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate({})", self.fingerprint())
    }
}

impl Serialize for Certificate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Certificate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let der = decode(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)?;
        Ok(Self(CertificateDer::from(der)))
    }
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    if text.len() > MAX_CERTIFICATE * 4 / 3 {
        return Err(format!("longer than {MAX_CERTIFICATE} bytes"));
    }
    STANDARD.decode(text).map_err(|error| error.to_string())
}

/// A private key in PKCS #8 form. Never shown.
#[derive(Clone, PartialEq, Eq)]
struct PrivateKey(Vec<u8>);

impl Serialize for PrivateKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for PrivateKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        decode(&String::deserialize(deserializer)?).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A key pair (ECDSA P-256) with its certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyPair {
    /// The self-signed certificate.
    pub certificate: Certificate,
    key: PrivateKey,
    /// When it was made, ms since 1970.
    pub created_ms: u64,
    /// When the certificate ends, ms since 1970.
    pub expires_ms: u64,
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// A key pair cannot be made: the system's random source or the library fails.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a key pair: {0}")]
pub struct MakeError(#[from] rcgen::Error);

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    since_1970(SystemTime::now())
}

fn since_1970(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl KeyPair {
    /// Makes a fresh one for this host.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn generate(host: HostId) -> Result<Self, MakeError> {
        Self::until(host, SystemTime::now() + LIFETIME)
    }

    /// As [`Self::generate`], with an end of one's own: for tests of expiry.
    pub(crate) fn until(host: HostId, end: SystemTime) -> Result<Self, MakeError> {
        use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(vec![dns_name(host)])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, dns_name(host));
        params.is_ca = IsCa::NoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        // Far back: a host whose clock is behind must not lose its backup over it.
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = end.into();
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate: Certificate(certificate.der().clone()),
            key: PrivateKey(key.serialize_der()),
            created_ms: now_ms(),
            expires_ms: since_1970(end),
        })
    }

    /// The private key for the TLS library.
    #[must_use]
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_certificate_names_its_host_and_no_other() {
        let (ours, other) = (HostId(Uuid::from_u128(1)), HostId(Uuid::from_u128(2)));
        let pair = KeyPair::generate(ours).unwrap();
        assert!(pair.certificate.names(ours));
        assert!(!pair.certificate.names(other));
        assert!(!Certificate::new(CertificateDer::from(vec![1, 2, 3])).names(ours));
    }

    #[test]
    fn fingerprints_are_written_as_ssh_does() {
        // `printf abc | sha256sum | cut -d' ' -f1 | xxd -r -p | base64`, without the padding.
        let text = "SHA256:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0";
        let fingerprint = Fingerprint::of(b"abc");
        assert_eq!(fingerprint.to_string(), text);
        assert_eq!(text.parse(), Ok(fingerprint));
        for wrong in ["", "SHA256:", "MD5:00", "SHA256:AAAA", &text[7..]] {
            assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_come_back_from_json_and_are_not_shown() {
        let pair = KeyPair::generate(HostId(Uuid::from_u128(1))).unwrap();
        let json = serde_json::to_string(&pair).unwrap();
        assert_eq!(serde_json::from_str::<KeyPair>(&json).unwrap(), pair);
        let key = STANDARD.encode(&pair.key.0);
        assert!(json.contains(&key));
        assert!(!format!("{pair:?}").contains(&key[..20]));
    }
}
