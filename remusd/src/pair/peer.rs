//! What is remembered of a paired host.

use serde::{Deserialize, Serialize};

use super::certificate::{Certificate, Fingerprint, HostId};

/// How long a replaced certificate is still accepted after its successor was first used, unless the peer retires it sooner.
pub const OVERLAP_MS: u64 = 24 * 3600 * 1000;

/// Most certificates of one peer: the one in use and the announced next one.
pub(super) const MAX_PINS: usize = 2;

/// A certificate that is accepted from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The certificate, byte for byte.
    pub certificate: Certificate,
    /// When it was pinned, ms since 1970.
    pub added_ms: u64,
    /// From when on it is not accepted any more, ms since 1970.
    #[serde(default)]
    pub until_ms: Option<u64>,
}

/// A paired host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its identity, the same through all its keys.
    pub id: HostId,
    /// What it is called here: as typed at pairing, or as it named itself.
    pub name: String,
    /// Host name or address at which its remusd is reached.
    pub address: String,
    /// TCP port there.
    pub port: u16,
    /// When it was paired, ms since 1970.
    pub paired_ms: u64,
    /// Its certificates: the older first. One, or two while it changes its key.
    pub pins: Vec<Pin>,
}

impl Peer {
    /// The pin of this very certificate, if it is accepted now.
    pub(super) fn pin(&self, certificate: &Certificate, now_ms: u64) -> Option<&Pin> {
        self.pins.iter().find(|p| p.certificate == *certificate && p.until_ms.is_none_or(|until| now_ms < until))
    }

    /// Whether this is what people mean by `typed`: its name, its address or its identity.
    #[must_use]
    pub fn is_called(&self, typed: &str) -> bool {
        self.name == typed || self.address == typed || typed.parse() == Ok(self.id.0)
    }

    /// The fingerprint of its newest certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.pins.last().map(|pin| pin.certificate.fingerprint())
    }

    /// Accepts a further certificate beside the one with which it was announced.
    pub(super) fn announce(&mut self, with: &Certificate, next: Certificate, now_ms: u64) {
        if *with == next {
            return;
        }
        // An earlier announcement that was never used gives way.
        self.pins.retain(|pin| pin.certificate == *with);
        self.pins.push(Pin { certificate: next, added_ms: now_ms, until_ms: None });
        debug_assert!(self.pins.len() <= MAX_PINS);
    }

    /// Notes that this certificate was used: from now on its predecessor's time runs out. True if that is news.
    pub(super) fn used(&mut self, certificate: &Certificate, now_ms: u64) -> bool {
        let Some(at) = self.pins.iter().position(|pin| pin.certificate == *certificate) else { return false };
        let mut news = false;
        for old in &mut self.pins[..at] {
            if old.until_ms.is_none() {
                old.until_ms = Some(now_ms.saturating_add(OVERLAP_MS));
                news = true;
            }
        }
        news
    }

    /// Accepts this certificate alone.
    pub(super) fn retire_all_but(&mut self, certificate: &Certificate) {
        self.pins.retain(|pin| pin.certificate == *certificate);
    }
}

/// Whether a text can be a host's name or address: it is dialled and shown, never run.
#[must_use]
pub fn is_host(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && !text.starts_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._:%".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::CertificateDer;

    fn certificate(n: u8) -> Certificate {
        Certificate::new(CertificateDer::from(vec![n]))
    }

    fn peer() -> Peer {
        Peer {
            id: HostId(uuid::Uuid::from_u128(7)),
            name: "hostb".into(),
            address: "10.0.0.2".into(),
            port: 1,
            paired_ms: 0,
            pins: vec![Pin { certificate: certificate(1), added_ms: 0, until_ms: None }],
        }
    }

    #[test]
    fn old_and_new_overlap_and_then_only_the_new_is_accepted() {
        let mut peer = peer();
        let (old, new) = (certificate(1), certificate(2));
        peer.announce(&old, new.clone(), 5);
        assert!(peer.pin(&old, 10).is_some() && peer.pin(&new, 10).is_some());
        assert!(!peer.used(&old, 10), "the old one's use ends nothing");
        assert!(peer.used(&new, 10));
        assert!(!peer.used(&new, 20), "told once");
        assert!(peer.pin(&old, 10 + OVERLAP_MS - 1).is_some());
        assert!(peer.pin(&old, 10 + OVERLAP_MS).is_none());
        assert!(peer.pin(&new, u64::MAX).is_some());
        peer.retire_all_but(&new);
        assert_eq!(peer.pins.len(), 1);
    }

    #[test]
    fn announcements_do_not_pile_up() {
        let mut peer = peer();
        for n in 2..200 {
            peer.announce(&certificate(1), certificate(n), 0);
        }
        peer.announce(&certificate(1), certificate(1), 0);
        assert_eq!(peer.pins.len(), MAX_PINS);
        assert!(peer.pin(&certificate(199), 0).is_some() && peer.pin(&certificate(198), 0).is_none());
    }

    #[test]
    fn names_that_a_shell_or_a_terminal_would_mind_are_no_hosts() {
        for good in ["hostb", "10.0.0.2", "fe80::1%eth0", "a.b-c.example"] {
            assert!(is_host(good), "{good}");
        }
        for bad in ["", "-oProxyCommand=x", "a b", "a;b", "a\x1b[0m", "$(x)", &"a".repeat(300)] {
            assert!(!is_host(bad), "{bad}");
        }
    }
}
