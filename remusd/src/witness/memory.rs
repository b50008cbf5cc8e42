//! A witness in memory, for tests: [`Table`] is the pure store (also for a simulator), [`MemoryStore`] the same as a [`WitnessStore`]
//! that can fail in every way a real one does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::client::{CasReply, ReadError};
use super::record::{Position, Record, Versioned};
use super::store::WitnessStore;
use crate::ids::ProtectionId;

/// Records with revisions, as etcd keeps them. Cloning it is taking a backup, putting the clone back is a rollback.
#[derive(Clone, Debug)]
pub struct Table {
    name: String,
    revision: u64,
    records: HashMap<ProtectionId, (Record, u64)>,
}

impl Table {
    /// Empty; `name` is its identity.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), revision: 1, records: HashMap::new() }
    }

    /// Reads.
    #[must_use]
    pub fn read(&self, protection: ProtectionId) -> Versioned {
        let found = self.records.get(&protection);
        Versioned { record: found.map(|(r, _)| r.clone()), position: self.position(found.map_or(0, |(_, m)| *m)) }
    }

    /// Swaps; `None` is a conflict.
    pub fn cas(&mut self, protection: ProtectionId, expected: &Versioned, new: &Record) -> Option<Position> {
        let there = self.read(protection);
        if there.record != expected.record || there.position.modified != expected.position.modified {
            return None;
        }
        self.revision += 1;
        self.records.insert(protection, (new.clone(), self.revision));
        Some(self.position(self.revision))
    }

    /// Forgets everything but its identity, as a witness whose data was deleted.
    pub fn wipe(&mut self) {
        *self = Self::new(std::mem::take(&mut self.name));
    }

    /// Now.
    #[must_use]
    pub fn position(&self, modified: u64) -> Position {
        Position { store: self.name.clone(), revision: self.revision, modified }
    }
}

/// What happens to the next requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Nothing gets there.
    pub down: bool,
    /// So many swaps are applied, and their replies lost.
    pub lose_replies: u32,
    /// So many swaps are lost on the way.
    pub lose_requests: u32,
}

/// Clones share the table and the faults.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    table: Arc<Mutex<Table>>,
    faults: Arc<Mutex<Faults>>,
}

impl MemoryStore {
    /// Empty and well.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { table: Arc::new(Mutex::new(Table::new(name))), faults: Arc::default() }
    }

    /// The same store as another host reaches it: with faults of its own.
    #[must_use]
    pub fn other_host(&self) -> Self {
        Self { table: self.table.clone(), faults: Arc::default() }
    }

    /// Looks at or changes the table.
    pub fn with<T>(&self, f: impl FnOnce(&mut Table) -> T) -> T {
        f(&mut self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at or changes the faults.
    pub fn faults<T>(&self, f: impl FnOnce(&mut Faults) -> T) -> T {
        f(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_down(&self) -> bool {
        self.faults(|f| f.down)
    }
}

#[async_trait]
impl WitnessStore for MemoryStore {
    async fn read(&self, protection: ProtectionId) -> Result<Versioned, ReadError> {
        if self.is_down() {
            return Err(ReadError::Unavailable("it is down".into()));
        }
        Ok(self.with(|t| t.read(protection)))
    }

    async fn cas(&self, protection: ProtectionId, expected: &Versioned, new: &Record) -> CasReply {
        let take = |n: &mut u32| n.checked_sub(1).map(|left| *n = left).is_some();
        if self.is_down() || self.faults(|f| take(&mut f.lose_requests)) {
            return CasReply::Unknown("no answer".into());
        }
        let applied = self.with(|t| t.cas(protection, expected, new));
        if self.faults(|f| take(&mut f.lose_replies)) {
            return CasReply::Unknown("no answer".into());
        }
        applied.map_or(CasReply::Conflict, CasReply::Applied)
    }

    async fn probe(&self) -> Result<Position, String> {
        if self.is_down() {
            return Err("it is down".into());
        }
        Ok(self.with(|t| t.position(0)))
    }

    fn describe(&self) -> String {
        self.with(|t| format!("memory {}", t.name))
    }
}
