//! What survives a crash of the daemon: small JSON files, replaced as a whole (write, fsync, rename, fsync of the folder).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::gate::GateList;
use crate::gate::autostart::Kept;
use crate::ids::{DomId, Generation, Nonce, ProtectionId};
use crate::protect::options::{ProtectOptions, Target};

mod witness;

/// Version of these files. A file of another version is refused, never guessed at.
pub const STATE_VERSION: u32 = 1;

/// State on disk cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("State file {path}: {source}; check that the disk is not full and the folder is writable")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not ours, or of another version.
    #[error("State file {path} cannot be understood: {text}; it was left alone. Move it away to go on without it")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
}

/// A protection of which this host is the primary, as a restarted daemon needs it (hazards F2, F23).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrimaryRecord {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// The protection.
    pub uuid: ProtectionId,
    /// Domain name.
    pub name: String,
    /// Domain id when protection began.
    pub domid: DomId,
    /// Session.
    pub generation: Generation,
    /// Session.
    pub nonce: Nonce,
    /// Whether an epoch may have been armed: from then on the guest's output has to be sealed on a restart.
    pub armed: bool,
    /// Whether the peer has said that its copy runs: this one stays sealed whatever happens (R3, R9).
    #[serde(default)]
    pub superseded: bool,
    /// The mode that counts here (hazard F19): who decides after a restart.
    #[serde(default)]
    pub token: crate::link::Token,
    /// Whether the guest was given to the backup without a witness: then it stays still until the backup says what became of it.
    #[serde(default)]
    pub handed_over: bool,
    /// Whether we have stopped the guest's vCPUs because the other copy may run: whoever owns it again lets them go on.
    #[serde(default)]
    pub frozen: bool,
    /// Where the copy is.
    pub target: Target,
    /// How it was protected.
    pub options: ProtectOptions,
    /// What the device layer needs to undo itself, per device.
    pub devices: Vec<serde_json::Value>,
    /// Names of the vifs, to be sealed first thing.
    pub vifs: Vec<String>,
    /// The domain's configuration as libxl's JSON: to boot it again when it reboots.
    pub config: String,
    /// Whether the guest has been suspended by us: from then on xl's monitor is gone and we are in its place (hazard F24).
    pub monitor: bool,
    /// The save helper's process id and start time, to end a left-over one and nobody else.
    pub helper: Option<(u32, u64)>,
}

/// A protection that the daemon brings about by itself as soon as the other host answers, also after a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgainRecord {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// The protection.
    pub uuid: ProtectionId,
    /// Domain name.
    pub name: String,
    /// Where the copy is to be.
    pub target: Target,
    /// How it is to be protected.
    pub options: ProtectOptions,
}

/// The folder that holds the state.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Opens (and makes, mode of the umask) the folder.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StateError> {
        let root = root.into();
        for dir in ["primary", "backup", "monitor", "again"] {
            let path = root.join(dir);
            fs::create_dir_all(&path).map_err(|source| StateError::Io { path, source })?;
        }
        Ok(Self { root })
    }

    /// Keeps what xendomains would have booted, while the domain is protected. Replaces what was kept.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn keep_autostart(&self, uuid: ProtectionId, kept: &[Kept]) -> Result<(), StateError> {
        let folder = self.root.join("autostart");
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        put(&folder.join(format!("{uuid}.json")), &kept)
    }

    /// What is kept of this domain; nothing if there is nothing.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn autostart(&self, uuid: ProtectionId) -> Result<Vec<Kept>, StateError> {
        let path = self.root.join("autostart").join(format!("{uuid}.json"));
        if path.exists() { get(&path) } else { Ok(Vec::new()) }
    }

    /// Puts what is kept back where it was: this host owns the domain. Fine when there is nothing.
    ///
    /// # Errors
    /// [`StateError`]; it is still kept then.
    pub fn put_autostart_back(&self, uuid: ProtectionId) -> Result<(), StateError> {
        for kept in self.autostart(uuid)? {
            kept.put_back().map_err(io(&kept.path))?;
        }
        remove(&self.root.join("autostart").join(format!("{uuid}.json")))
    }

    /// The list of guarded domains in this folder.
    #[must_use]
    pub fn gate(&self) -> GateList {
        GateList::new(&self.root)
    }

    fn primary_path(&self, uuid: ProtectionId) -> PathBuf {
        self.root.join("primary").join(format!("{uuid}.json"))
    }

    /// Writes a record durably.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn put_primary(&self, record: &PrimaryRecord) -> Result<(), StateError> {
        put(&self.primary_path(record.uuid), record)
    }

    /// Forgets a record. Fine when there is none.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove_primary(&self, uuid: ProtectionId) -> Result<(), StateError> {
        remove(&self.primary_path(uuid))
    }

    /// All records that can be read, and the errors of those that cannot.
    pub fn primaries(&self) -> (Vec<PrimaryRecord>, Vec<StateError>) {
        list(&self.root.join("primary"))
    }

    /// Writes a backup-side record, whose shape is the backup's own.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn put_backup<T: Serialize>(&self, uuid: ProtectionId, record: &T) -> Result<(), StateError> {
        put(&self.root.join("backup").join(format!("{uuid}.json")), record)
    }

    /// Forgets a backup-side record. Fine when there is none.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove_backup(&self, uuid: ProtectionId) -> Result<(), StateError> {
        remove(&self.root.join("backup").join(format!("{uuid}.json")))
    }

    /// All backup-side records.
    pub fn backups<T: DeserializeOwned>(&self) -> (Vec<T>, Vec<StateError>) {
        list(&self.root.join("backup"))
    }

    /// Writes the record of a domain that we are the monitor of.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn put_monitor<T: Serialize>(&self, uuid: ProtectionId, record: &T) -> Result<(), StateError> {
        put(&self.root.join("monitor").join(format!("{uuid}.json")), record)
    }

    /// Forgets it. Fine when there is none.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove_monitor(&self, uuid: ProtectionId) -> Result<(), StateError> {
        remove(&self.root.join("monitor").join(format!("{uuid}.json")))
    }

    /// All domains that we are the monitor of.
    pub fn monitors<T: DeserializeOwned>(&self) -> (Vec<T>, Vec<StateError>) {
        list(&self.root.join("monitor"))
    }

    /// Writes durably what the daemon is to protect again.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn put_again(&self, record: &AgainRecord) -> Result<(), StateError> {
        put(&self.root.join("again").join(format!("{}.json", record.uuid)), record)
    }

    /// Forgets it. Fine when there is none.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove_again(&self, uuid: ProtectionId) -> Result<(), StateError> {
        remove(&self.root.join("again").join(format!("{uuid}.json")))
    }

    /// All that is to be protected again.
    pub fn agains(&self) -> (Vec<AgainRecord>, Vec<StateError>) {
        list(&self.root.join("again"))
    }

    /// Reserves the next generation for a protection: durable before it is returned, never handed out twice (R4).
    ///
    /// # Errors
    /// [`StateError`]; no generation is used then.
    pub fn next_generation(&self, uuid: ProtectionId, at_least: Generation) -> Result<Generation, StateError> {
        let path = self.root.join("generations.json");
        let mut all: BTreeMap<ProtectionId, Generation> = if path.exists() { get(&path)? } else { BTreeMap::new() };
        let last = all.get(&uuid).copied().unwrap_or_default().max(at_least);
        let next = Generation(last.0 + 1);
        all.insert(uuid, next);
        put(&path, &all)?;
        Ok(next)
    }
}

/// A process's start time in clock ticks since boot (`/proc/PID/stat`, field 22): with its id it names one process for ever.
/// `None` if there is no such process.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything, also spaces and parentheses.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::Io { path, source }
}

fn put<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let bytes =
        serde_json::to_vec_pretty(value).map_err(|e| StateError::Format { path: path.into(), text: e.to_string() })?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary).map_err(io(&temporary))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io(&temporary))?;
    fs::rename(&temporary, path).map_err(io(path))?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(io(dir))
}

fn get<T: DeserializeOwned>(path: &Path) -> Result<T, StateError> {
    let bytes = fs::read(path).map_err(io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| StateError::Format { path: path.into(), text: e.to_string() })
}

fn remove(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(path)(e)),
        _ => Ok(()),
    }
}

fn list<T: DeserializeOwned>(dir: &Path) -> (Vec<T>, Vec<StateError>) {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return (found, vec![io(dir)(e)]),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "json") {
            match get(&path) {
                Ok(record) => found.push(record),
                Err(error) => errors.push(error),
            }
        }
    }
    (found, errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> PrimaryRecord {
        PrimaryRecord {
            version: STATE_VERSION,
            uuid: ProtectionId::from_u128(5),
            name: "g".into(),
            domid: DomId(3),
            generation: Generation(2),
            nonce: Nonce::random(),
            armed: true,
            superseded: false,
            token: crate::link::Token::Primary,
            handed_over: false,
            frozen: false,
            target: Target::Blackhole,
            options: ProtectOptions::default(),
            devices: vec![],
            vifs: vec!["vif3.0".into()],
            config: "{}".into(),
            monitor: true,
            helper: Some((77, 1234)),
        }
    }

    #[test]
    fn records_come_back_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.put_primary(&record()).unwrap();
        assert_eq!(state.primaries().0, [PrimaryRecord { nonce: state.primaries().0[0].nonce, ..record() }]);
        state.remove_primary(record().uuid).unwrap();
        state.remove_primary(record().uuid).unwrap();
        assert!(state.primaries().0.is_empty());
    }

    #[test]
    fn an_autostart_entry_is_kept_and_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path().join("state")).unwrap();
        let (uuid, path) = (ProtectionId::from_u128(5), dir.path().join("web"));
        assert_eq!(state.autostart(uuid).unwrap(), []);
        fs::write(&path, "name='web'").unwrap();
        let kept = Kept::of(&path).unwrap();
        state.keep_autostart(uuid, std::slice::from_ref(&kept)).unwrap();
        kept.remove().unwrap();
        assert_eq!(state.autostart(uuid).unwrap(), [kept]);
        state.put_autostart_back(uuid).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "name='web'");
        assert_eq!(state.autostart(uuid).unwrap(), []);
        state.put_autostart_back(uuid).unwrap();
    }

    #[test]
    fn a_torn_file_is_reported_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.put_primary(&record()).unwrap();
        fs::write(dir.path().join("primary/torn.json"), "{\"version\":").unwrap();
        let (good, bad) = state.primaries();
        assert_eq!((good.len(), bad.len()), (1, 1));
        assert!(bad[0].to_string().contains("torn.json"));
    }

    #[test]
    fn generations_only_grow_also_across_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = ProtectionId::from_u128(1);
        let next =
            |at_least| StateDir::open(dir.path()).unwrap().next_generation(uuid, Generation(at_least)).unwrap().0;
        assert_eq!([next(0), next(0), next(10), next(0)], [1, 2, 11, 12]);
    }
}
