//! TLS 1.3 between two remusd whose hosts were paired: both show a certificate, both accept only the very ones that they have
//! pinned. After the handshake the stream carries the same frames as over ssh.
//!
//! `config` decides who is accepted, `dial` and `listen` are the two ends, `socket` sets what TCP needs for a link, `stream` ends
//! when its peer is unpaired. docs/pairing.md is the description.

mod config;
pub mod dial;
pub mod listen;
mod socket;
mod stream;

pub use dial::{Dial, DialError};
pub use listen::{Arrived, Limits, ListenState, listen};

use std::time::Duration;

/// TCP port of a remusd: REMU on a telephone's keys. Not registered with IANA.
pub const DEFAULT_PORT: u16 = 7368;

/// Most time for a TLS handshake, on either side. It takes milliseconds and two round trips.
pub const HANDSHAKE: Duration = Duration::from_secs(5);

/// What a TLS session is for; agreed in its handshake (ALPN, RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Frames: a protection or a query.
    Link,
    /// One question about keys, and its answer.
    Keys,
}

impl Use {
    const ALL: [Self; 2] = [Self::Link, Self::Keys];

    /// Its name in the handshake.
    #[must_use]
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Link => b"remus-link/1",
            Self::Keys => b"remus-keys/1",
        }
    }

    fn of(alpn: Option<&[u8]>) -> Option<Self> {
        Self::ALL.into_iter().find(|it| Some(it.alpn()) == alpn)
    }
}

#[cfg(test)]
mod tests;
