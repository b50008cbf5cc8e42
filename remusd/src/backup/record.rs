//! What a restarted daemon must know of the backup side (hazard F25b, DESIGN R4, R9).

use devices::script::ScriptedDisk;
use serde::{Deserialize, Serialize};

use super::error::BackupError;
use crate::ids::{Epoch, Generation, Nonce, ProtectionId, SessionKey};
use crate::link::{ProtectOffer, Role, Token};
use crate::pair::HostId;
use crate::state::{STATE_VERSION, StateDir};

/// How far a protection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// A receiver may be running and an incoming domain may exist; after a crash both are to be cleared away.
    Receiving,
    /// GO may have been sent: after a crash the domain itself tells whether it was.
    Starting,
    /// The copy was activated.
    Active,
    /// Nothing is left. Kept for its generation.
    Discarded,
}

impl Phase {
    /// What a host is to a protection that only its record tells of, as told to a peer that asks.
    #[must_use]
    pub fn role(self) -> Role {
        match self {
            Self::Receiving | Self::Discarded => Role::Discarded,
            Self::Starting => Role::Activating,
            Self::Active => Role::Active,
        }
    }
}

/// One protection of which this host is, or was, the backup. Saved before the fact: a record may say more than happened, never less.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingRecord {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// The protection.
    pub uuid: ProtectionId,
    /// The domain's name, without `--incoming`.
    pub name: String,
    /// The newest session that was accepted; older generations are refused for ever.
    pub generation: Generation,
    /// The session's nonce.
    pub nonce: Nonce,
    /// How far it came.
    pub phase: Phase,
    /// The activated epoch, once active.
    pub activated: Option<Epoch>,
    /// The paired host whose guest this is; `None` if the session came through this host's root (ssh).
    #[serde(default)]
    pub party: Option<HostId>,
    /// The mode that was agreed last, written before it is acknowledged.
    #[serde(default)]
    pub token: Token,
    /// Whether a claim was sent and the witness does not know yet what became of it.
    #[serde(default)]
    pub owed: bool,
    /// What was agreed with the primary.
    #[serde(default)]
    pub offer: Option<ProtectOffer>,
    /// Its mirrored disks: they follow until the copy is activated or given up.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Its disks that programs keep, likewise.
    #[serde(default)]
    pub scripted: Vec<ScriptedDisk>,
}

impl IncomingRecord {
    /// The record of a session that is about to receive.
    #[must_use]
    pub fn receiving(uuid: ProtectionId, name: &str, key: SessionKey, party: Option<HostId>) -> Self {
        Self {
            version: STATE_VERSION,
            uuid,
            name: name.to_owned(),
            generation: key.generation,
            nonce: key.nonce,
            phase: Phase::Receiving,
            activated: None,
            party,
            token: Token::Primary,
            owed: false,
            offer: None,
            disks: Vec::new(),
            scripted: Vec::new(),
        }
    }
}

/// Where records live. Saving blocks until the record is durable (milliseconds).
pub trait RecordStore: Send + Sync {
    /// All records.
    ///
    /// # Errors
    /// [`BackupError::Record`] if any cannot be read: an unknown record must not be taken for none.
    fn load(&self) -> Result<Vec<IncomingRecord>, BackupError>;

    /// Replaces the protection's record durably.
    ///
    /// # Errors
    /// [`BackupError::Record`].
    fn save(&self, record: &IncomingRecord) -> Result<(), BackupError>;
}

impl RecordStore for StateDir {
    fn load(&self) -> Result<Vec<IncomingRecord>, BackupError> {
        let (records, errors) = self.backups::<IncomingRecord>();
        match errors.into_iter().next() {
            Some(error) => Err(BackupError::Record(error.to_string())),
            None => Ok(records),
        }
    }

    fn save(&self, record: &IncomingRecord) -> Result<(), BackupError> {
        self.put_backup(record.uuid, record).map_err(|error| BackupError::Record(error.to_string()))
    }
}
