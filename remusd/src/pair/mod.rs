//! Pairing: who may speak TLS with this host (docs/pairing.md).
//!
//! `certificate` makes keys, `files` keeps them from others, `peer` says which certificates of a host are accepted, `keyring` holds
//! all of it, `sessions` the open connections. `message` and `exchange` are the conversation over ssh in which two hosts learn each
//! other's certificate, `rotate` changes keys later, `service` is what the daemon does of it, asked at the `socket`.

pub mod certificate;
pub mod exchange;
mod files;
pub mod keyring;
pub mod message;
pub mod peer;
pub mod rotate;
pub mod service;
pub mod sessions;
pub mod socket;

pub use certificate::{Certificate, Fingerprint, HostId, KeyPair};
pub use files::FileError;
pub use keyring::{Keyring, KeyringError};
pub use peer::Peer;
pub use service::{Pairing, PairingRequest};
