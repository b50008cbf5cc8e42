//! What stands at the witness: one record per protection, and what a host remembers of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Nonce, ProtectionId};

/// Version of [`Record`]'s JSON. A record of another version is refused, never guessed at.
pub const RECORD_VERSION: u32 = 1;

/// The identity of one installation of remusd: random, made once, kept in the state folder. Two hosts never share one, a reinstalled
/// host has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub uuid::Uuid);

impl HostId {
    /// A new identity from the operating system's random source.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A host as the record names it. Only `id` decides anything; see [`Host::is`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Who it is.
    pub id: HostId,
    /// What people call it; may change.
    pub name: String,
}

impl Host {
    /// Whether both are the same installation, whatever they are called.
    #[must_use]
    pub fn is(&self, other: &Host) -> bool {
        self.id == other.id
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// 128 random bits that name one run of one intent: by them a host recognises its own change after a lost reply (hazard F8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attempt(pub uuid::Uuid);

impl Attempt {
    /// A fresh one from the operating system's random source.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

/// What both sides of a protection know of the armed record. Not the session's generation and nonce: a record can be armed anew
/// within a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RecordKey {
    /// Generation of the record.
    pub generation: Generation,
    /// Nonce of the record.
    pub nonce: Nonce,
}

/// Who may run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordState {
    /// The owner (primary) runs it under protection; owner or peer may claim.
    Armed,
    /// The owner has claimed and is about to run it alone.
    Claimed,
    /// The owner runs it.
    Active,
    /// The owner gave its claim up: its copy is proven gone and never ran. The peer may claim.
    Forfeited,
    /// Protection has ended; the owner keeps the guest.
    Stopped,
    /// The owner has given it to the peer, who may claim; the owner may claim it back.
    HandedTo,
}

impl fmt::Display for RecordState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Armed => "armed",
            Self::Claimed => "claimed",
            Self::Active => "active",
            Self::Forfeited => "forfeited",
            Self::Stopped => "stopped",
            Self::HandedTo => "handed over",
        })
    }
}

/// The record of one protection. Changed only by compare-and-swap against the whole of it; every change carries a fresh `attempt`, so
/// no value ever comes back and comparing values is as good as comparing revisions.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The protection.
    pub uuid: ProtectionId,
    /// Grows with every arming and every forced claim.
    pub generation: Generation,
    /// Random per generation: a rebuilt witness cannot make an old generation valid again (hazard F7).
    pub nonce: Nonce,
    /// Who may run.
    pub state: RecordState,
    /// See [`RecordState`].
    pub owner: Host,
    /// The other host of the protection.
    pub peer: Host,
    /// Who wrote this value, and in which run of which intent.
    pub attempt: Attempt,
}

impl Record {
    /// Generation and nonce.
    #[must_use]
    pub fn key(&self) -> RecordKey {
        RecordKey { generation: self.generation, nonce: self.nonce }
    }

    /// The value as it is stored: one line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a record has nothing that JSON cannot say")
    }

    /// Reads a stored value.
    ///
    /// # Errors
    /// A sentence, if it is not a record of [`RECORD_VERSION`] for `uuid`.
    pub fn from_json(uuid: ProtectionId, value: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version: Version =
            serde_json::from_slice(value).map_err(|e| format!("the witness record is not ours: {e}"))?;
        if version.version != RECORD_VERSION {
            return Err(format!(
                "the witness record has version {}, this remusd knows {RECORD_VERSION}; upgrade this host",
                version.version
            ));
        }
        let record: Self =
            serde_json::from_slice(value).map_err(|e| format!("the witness record cannot be read: {e}"))?;
        if record.uuid != uuid {
            return Err(format!("the witness record is that of another domain, {}", record.uuid));
        }
        Ok(record)
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, owner, peer, .. } = self;
        match self.state {
            RecordState::Armed => write!(f, "generation {generation}: armed, {owner} runs it, {peer} may claim"),
            RecordState::Claimed => write!(f, "generation {generation}: claimed by {owner}"),
            RecordState::Active => write!(f, "generation {generation}: runs on {owner}"),
            RecordState::Forfeited => {
                write!(f, "generation {generation}: {owner} gave its claim up, {peer} may claim")
            }
            RecordState::Stopped => write!(f, "generation {generation}: protection ended, {owner} keeps the guest"),
            RecordState::HandedTo => write!(f, "generation {generation}: handed over by {owner} to {peer}"),
        }
    }
}

/// When a store was looked at. Its parts never go back unless the store was restored from a backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Which store: etcd's cluster id. Another value is another store.
    pub store: String,
    /// Revision of the whole store at the time of the answer; 0 for a store that has none.
    pub revision: u64,
    /// Revision of the record's last change; 0 if absent or unknown. Compared for itself, since a restored etcd can be told to begin
    /// at a higher revision.
    pub modified: u64,
}

/// An answer to reading: the record, or that there is none, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// `None`: the store has no record of this protection.
    pub record: Option<Record>,
    /// When.
    pub position: Position,
}

/// What a host remembers of a protection's record, durably: what is older than that is refused (hazard F7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watermark {
    /// The newest generation and nonce seen. `None`: this host has never seen a record of this protection.
    pub key: Option<RecordKey>,
    /// The newest position seen.
    pub position: Option<Position>,
}

impl Watermark {
    /// The newest generation seen; 0 if none.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.key.map_or(Generation(0), |k| k.generation)
    }

    /// Takes note of something newer (or as new). The caller has checked that it is not older.
    pub(super) fn raise(&mut self, record: Option<&Record>, position: &Position) {
        if let Some(record) = record {
            self.key = Some(record.key());
        }
        match &mut self.position {
            Some(p) if p.store == position.store => {
                p.revision = p.revision.max(position.revision);
                p.modified = p.modified.max(position.modified);
            }
            p => *p = Some(position.clone()),
        }
    }
}
