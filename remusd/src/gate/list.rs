//! The list of guarded domains, in a form that a shell script reads.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::ids::ProtectionId;

/// Where the list is below the daemon's state folder. `scripts/vif-remus` has the whole path.
pub const FOLDER: &str = "gate";

/// Why a backup guards a domain.
const COPY: &str = "this host holds its copy and has not taken it over";

/// The list cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("Gate entry {path}: {source}; check that the disk is not full and the folder is writable")]
pub struct GateError {
    /// Which file.
    pub path: PathBuf,
    /// What the system said.
    pub source: std::io::Error,
}

/// A guarded domain. Whatever has one of these three is taken for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its UUID.
    pub uuid: ProtectionId,
    /// Its name: a configuration without a UUID gets a new one at each start.
    pub name: String,
    /// Its addresses, lower case.
    pub macs: Vec<String>,
    /// Why it is guarded, for people; one line.
    pub why: String,
}

impl Entry {
    /// From libxl's JSON, as far as it goes.
    #[must_use]
    pub fn of(uuid: ProtectionId, name: &str, config: &str, why: &str) -> Self {
        let value: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
        let nics = value.get("nics").and_then(|nics| nics.as_array());
        let macs = nics.into_iter().flatten().filter_map(|nic| Some(nic.get("mac")?.as_str()?.to_lowercase()));
        Self { uuid, name: name.to_owned(), macs: macs.collect(), why: why.to_owned() }
    }

    fn text(&self) -> String {
        let line = |word: &str, value: &str| format!("{word} {}\n", value.replace(['\n', '\r'], " "));
        let mut text = line("name", &self.name);
        for mac in &self.macs {
            text += &line("mac", mac);
        }
        text + &line("why", &self.why)
    }

    fn parse(uuid: ProtectionId, text: &str) -> Self {
        let mut entry = Self { uuid, name: String::new(), macs: Vec::new(), why: String::new() };
        for (word, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            match word {
                "name" => entry.name = value.into(),
                "mac" => entry.macs.push(value.into()),
                "why" => entry.why = value.into(),
                _ => {}
            }
        }
        entry
    }
}

/// The list.
#[derive(Clone, Debug)]
pub struct GateList {
    folder: PathBuf,
}

impl GateList {
    /// The list in a state folder.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { folder: state_dir.join(FOLDER) }
    }

    fn path(&self, uuid: ProtectionId) -> PathBuf {
        self.folder.join(uuid.to_string())
    }

    /// Guards a domain from here on, durably. Replaces an earlier entry.
    ///
    /// # Errors
    /// [`GateError`]: then it is not certain that it is guarded, and it must not be protected.
    pub fn guard(&self, entry: &Entry) -> Result<(), GateError> {
        let path = self.path(entry.uuid);
        let fail = |source| GateError { path: path.clone(), source };
        fs::create_dir_all(&self.folder).map_err(fail)?;
        // The script leaves files of this name alone.
        let fresh = path.with_extension("new");
        let mut file = File::create(&fresh).map_err(fail)?;
        file.write_all(entry.text().as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        fs::rename(&fresh, &path).map_err(fail)?;
        self.sync()
    }

    /// Guards a domain of which this host receives a copy. A host that was its primary and lost it stays guarded as such.
    ///
    /// # Errors
    /// As [`guard`](Self::guard).
    pub fn guard_copy(&self, uuid: ProtectionId, name: &str, config: &str) -> Result<(), GateError> {
        let before = self.entries()?.into_iter().find(|entry| entry.uuid == uuid);
        let why = before.map_or_else(|| COPY.to_owned(), |entry| entry.why);
        self.guard(&Entry::of(uuid, name, config, &why))
    }

    /// The copy is gone and never ran: guards the domain no longer, unless this host had lost it before the copy came.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    pub fn release_copy(&self, uuid: ProtectionId) -> Result<(), GateError> {
        let copy = self.entries()?.iter().any(|entry| entry.uuid == uuid && entry.why == COPY);
        if copy { self.release(uuid) } else { Ok(()) }
    }

    /// Guards it no longer: this host owns it. Fine when it was not guarded. Lifts no seal.
    ///
    /// # Errors
    /// [`GateError`]: then its next interface may come up sealed.
    pub fn release(&self, uuid: ProtectionId) -> Result<(), GateError> {
        let path = self.path(uuid);
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(GateError { path, source }),
        }
    }

    fn sync(&self) -> Result<(), GateError> {
        let fail = |source| GateError { path: self.folder.clone(), source };
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(fail)
    }

    /// All entries, by name. None when there has never been one.
    ///
    /// # Errors
    /// [`GateError`].
    pub fn entries(&self) -> Result<Vec<Entry>, GateError> {
        let fail = |source| GateError { path: self.folder.clone(), source };
        let files = match fs::read_dir(&self.folder) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(fail(source)),
        };
        let mut entries = Vec::new();
        for file in files {
            let path = file.map_err(fail)?.path();
            let uuid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let Some(uuid) = uuid else { continue };
            let text = fs::read_to_string(&path).map_err(|source| GateError { path, source })?;
            entries.push(Entry::parse(uuid, &text));
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name).then(a.uuid.cmp(&b.uuid)));
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let list = GateList::new(dir.path());
        assert_eq!(list.entries().unwrap(), []);
        let config = r#"{"nics":[{"mac":"00:16:3E:aa:BB:01"},{"devid":1}]}"#;
        let entry = Entry::of(ProtectionId::from_u128(7), "g", config, "protected towards\nb");
        assert_eq!(entry.macs, ["00:16:3e:aa:bb:01"]);
        list.guard(&entry).unwrap();
        list.guard(&entry).unwrap();
        let back = list.entries().unwrap();
        assert_eq!(back, [Entry { why: "protected towards b".into(), ..entry.clone() }]);
        list.release(entry.uuid).unwrap();
        list.release(entry.uuid).unwrap();
        assert_eq!(list.entries().unwrap(), []);
    }

    #[test]
    fn a_copy_that_comes_and_goes_does_not_make_a_loser_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let list = GateList::new(dir.path());
        let (lost, other) = (ProtectionId::from_u128(7), ProtectionId::from_u128(8));
        list.guard(&Entry::of(lost, "g", "{}", "lost to b")).unwrap();
        for uuid in [lost, other] {
            list.guard_copy(uuid, "g", "{}").unwrap();
            list.guard_copy(uuid, "g", "{}").unwrap();
        }
        assert_eq!(list.entries().unwrap().len(), 2);
        for uuid in [lost, other] {
            list.release_copy(uuid).unwrap();
        }
        let left = list.entries().unwrap();
        assert_eq!((left.len(), left[0].uuid, left[0].why.as_str()), (1, lost, "lost to b"));
    }

    #[test]
    fn a_configuration_that_cannot_be_read_still_guards_by_uuid_and_name() {
        let entry = Entry::of(ProtectionId::from_u128(7), "g", "oops", "");
        assert_eq!((entry.name.as_str(), entry.macs.len()), ("g", 0));
    }
}
