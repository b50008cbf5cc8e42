//! What the witness client remembers: who this host is, and how far each protection's record had got.

use std::path::PathBuf;

use super::{StateDir, StateError, get, io, put, remove};
use crate::ids::ProtectionId;
use crate::link::handshake::host_name;
use crate::witness::{Host, HostId, Watermark};

impl StateDir {
    /// This host, with the identity that was made when first asked for. An identity that cannot be read is an error and never replaced: a
    /// new one would make this host a stranger to its own records.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn host(&self) -> Result<Host, StateError> {
        let path = self.root.join("host-id");
        let id = if path.exists() {
            get(&path)?
        } else {
            let id = HostId::random();
            put(&path, &id)?;
            id
        };
        Ok(Host { id, name: host_name() })
    }

    fn watermark_path(&self, uuid: ProtectionId) -> PathBuf {
        self.root.join("witness").join(format!("{uuid}.json"))
    }

    /// What was seen of a protection's record; empty if never anything.
    ///
    /// # Errors
    /// [`StateError`]; what cannot be read must not count as never seen (R4).
    pub fn watermark(&self, uuid: ProtectionId) -> Result<Watermark, StateError> {
        let path = self.watermark_path(uuid);
        if path.exists() { get(&path) } else { Ok(Watermark::default()) }
    }

    /// Writes it durably.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn put_watermark(&self, uuid: ProtectionId, watermark: &Watermark) -> Result<(), StateError> {
        let dir = self.root.join("witness");
        std::fs::create_dir_all(&dir).map_err(io(&dir))?;
        put(&self.watermark_path(uuid), watermark)
    }

    /// Forgets it: an absent record is then a new protection's. For a domain that is gone for good.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn remove_watermark(&self, uuid: ProtectionId) -> Result<(), StateError> {
        remove(&self.watermark_path(uuid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::{Position, RecordKey};

    #[test]
    fn the_host_keeps_its_identity_and_the_watermark_survives() {
        let dir = tempfile::tempdir().unwrap();
        let host = StateDir::open(dir.path()).unwrap().host().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.host().unwrap(), host);
        let uuid = ProtectionId::from_u128(7);
        assert_eq!(state.watermark(uuid).unwrap(), Watermark::default());
        let seen = Watermark {
            key: Some(RecordKey { generation: crate::ids::Generation(4), nonce: crate::ids::Nonce::random() }),
            position: Some(Position { store: "s".into(), revision: 9, modified: 8 }),
        };
        state.put_watermark(uuid, &seen).unwrap();
        assert_eq!(StateDir::open(dir.path()).unwrap().watermark(uuid).unwrap(), seen);
        state.remove_watermark(uuid).unwrap();
        assert_eq!(state.watermark(uuid).unwrap(), Watermark::default());
        std::fs::write(dir.path().join("witness").join(format!("{uuid}.json")), "{").unwrap();
        assert!(matches!(state.watermark(uuid), Err(StateError::Format { .. })), "damaged is not never seen");
        std::fs::write(dir.path().join("host-id"), "").unwrap();
        assert!(matches!(state.host(), Err(StateError::Format { .. })));
    }
}
