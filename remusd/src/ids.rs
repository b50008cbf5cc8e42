//! The names of things that travel: epochs, generations, nonces, protections.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A Xen domain id on one host. Reused by Xen after a domain is gone, so it is never an identity across hosts or time: see [`ProtectionId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DomId(pub u32);

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The identity of a protection: the domain's Xen UUID, the same on both hosts.
pub type ProtectionId = uuid::Uuid;

/// The number of a checkpoint within one generation, from 0 (the first copy) upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Counts the sessions of a protection; only ever grows. Never reused, also after a failed session (DESIGN R4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// 128 random bits that name one session, so that a rolled-back generation counter cannot make an old frame valid again (hazard F7).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub uuid::Uuid);

impl Nonce {
    /// A fresh nonce from the operating system's random source.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({})", self.0.simple())
    }
}

/// What every frame of a session carries (DESIGN section 6, hazard F9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionKey {
    /// The session's generation.
    pub generation: Generation,
    /// The session's nonce.
    pub nonce: Nonce,
}
