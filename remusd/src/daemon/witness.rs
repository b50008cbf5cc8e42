//! The witnesses that this host uses: one store and one probe for all protections that name the same one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ids::ProtectionId;
use crate::protect::ownership::{Opened, WitnessSource};
use crate::state::StateDir;
use crate::witness::{Health, Keeper, Probe, WitnessConfig, WitnessStore};

/// Where the settings are that no command line should carry: certificates, users, timeouts. [`WitnessConfig`] as JSON.
pub const WITNESS_FILE: &str = "/etc/remus/witness.json";

/// What `--witness` says for the witness of [`WITNESS_FILE`] as it stands there.
pub const CONFIGURED: &str = "configured";

struct Shared {
    store: Arc<dyn WitnessStore>,
    probe: Arc<Probe>,
}

/// Opens witnesses. See the module.
pub struct Witnesses {
    state: StateDir,
    file: PathBuf,
    open: Mutex<HashMap<String, Shared>>,
}

impl Witnesses {
    /// With settings from `file`, which may be missing.
    #[must_use]
    pub fn new(state: StateDir, file: PathBuf) -> Self {
        Self { state, file, open: Mutex::default() }
    }

    /// The settings that `spec` means: `http(s)://HOST:PORT[,...]` is an etcd with those endpoints and all else as in the file,
    /// `script:PATH` a program, [`CONFIGURED`] the file as it is.
    ///
    /// # Errors
    /// A sentence.
    pub fn config(&self, spec: &str) -> Result<WitnessConfig, String> {
        let mut base: serde_json::Value = match std::fs::read(&self.file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", self.file.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::json!({}),
            Err(error) => return Err(format!("{}: {error}", self.file.display())),
        };
        let Some(settings) = base.as_object_mut() else {
            return Err(format!("{}: it is no object", self.file.display()));
        };
        if let Some(path) = spec.strip_prefix("script:") {
            if !path.starts_with('/') {
                return Err(format!("--witness {spec}: the program's path has to be absolute"));
            }
            settings.remove("etcd");
            let script = settings.entry("script").or_insert_with(|| serde_json::json!({}));
            script["path"] = path.into();
        } else if spec.starts_with("http://") || spec.starts_with("https://") {
            settings.remove("script");
            let etcd = settings.entry("etcd").or_insert_with(|| serde_json::json!({}));
            etcd["endpoints"] = spec.split(',').collect();
        } else if spec != CONFIGURED {
            return Err(format!(
                "--witness {spec}: give http://HOST:PORT or https://HOST:PORT (several with commas), script:/PATH, or {CONFIGURED} \
                 for the one in {}",
                self.file.display()
            ));
        }
        serde_json::from_value(base).map_err(|e| format!("{}: {e}", self.file.display()))
    }

    /// The witnesses that are asked, without what in their names is secret, and whether they answer; `None`: not known yet.
    #[must_use]
    pub fn health(&self) -> Vec<(String, Option<bool>)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let up = |shared: &Shared| match *shared.probe.health().borrow() {
            Health::Untried => None,
            Health::Up => Some(true),
            Health::Down(_) => Some(false),
        };
        open.iter().map(|(spec, shared)| (without_secrets(spec), up(shared))).collect()
    }

    /// Checks that the witness is usable and on neither host. Resolves names.
    ///
    /// # Errors
    /// A sentence.
    pub async fn check(&self, spec: &str, peer: &str) -> Result<(), String> {
        let config = self.config(spec)?;
        config.open().map_err(|e| e.to_string())?;
        config.check_place(peer).await.map_err(|e| e.to_string())
    }
}

/// A witness as typed, without users and passwords in URLs.
fn without_secrets(spec: &str) -> String {
    let one = |url: &str| match url.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host)),
        None => url.to_owned(),
    };
    spec.split(',').map(one).collect::<Vec<_>>().join(",")
}

impl WitnessSource for Witnesses {
    fn open(&self, spec: &str, protection: ProtectionId) -> Result<Opened, String> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if !open.contains_key(spec) {
            let config = self.config(spec)?;
            let store = config.open().map_err(|e| e.to_string())?;
            let probe = Arc::new(Probe::start(Arc::clone(&store), config.probe));
            open.insert(spec.to_owned(), Shared { store, probe });
        }
        let Shared { store, probe } = &open[spec];
        let (keeper, events) = Keeper::start(protection, Arc::clone(store), &self.state, Some(probe.as_ref()))
            .map_err(|e| e.to_string())?;
        Ok(Opened { keeper, events, health: probe.health(), probe: Some(Arc::clone(probe)) })
    }

    fn has_seen(&self, protection: ProtectionId) -> Result<bool, String> {
        self.state.watermark(protection).map(|mark| mark.key.is_some()).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witnesses(file: Option<&str>) -> (tempfile::TempDir, Witnesses) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("witness.json");
        if let Some(text) = file {
            std::fs::write(&path, text).unwrap();
        }
        let state = StateDir::open(dir.path().join("state")).unwrap();
        (dir, Witnesses::new(state, path))
    }

    #[test]
    fn what_is_secret_in_a_name_is_not_told() {
        assert_eq!(without_secrets("https://u:p@a:1,http://b:2"), "https://a:1,http://b:2");
        assert_eq!(without_secrets("script:/usr/lib/w"), "script:/usr/lib/w");
    }

    #[test]
    fn a_typed_witness_takes_the_rest_from_the_file() {
        let (_dir, plain) = witnesses(None);
        let etcd = plain.config("http://a:1,http://b:2").unwrap().etcd.unwrap();
        assert_eq!(etcd.endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(plain.config("script:/usr/lib/w").unwrap().script.unwrap().path, PathBuf::from("/usr/lib/w"));
        for wrong in ["script:w", "etcd", "ftp://x:1"] {
            assert!(plain.config(wrong).is_err(), "{wrong}");
        }

        let file = r#"{"etcd":{"endpoints":["https://c:3"],"ca":"/ca.pem"},"probe":{"interval_ms":100}}"#;
        let (_dir, filed) = witnesses(Some(file));
        assert_eq!(filed.config(CONFIGURED).unwrap().etcd.unwrap().endpoints, ["https://c:3"]);
        let etcd = filed.config("https://d:4").unwrap().etcd.unwrap();
        assert_eq!((etcd.endpoints, etcd.ca), (vec!["https://d:4".into()], Some("/ca.pem".into())));
        let script = filed.config("script:/w").unwrap();
        assert!(script.etcd.is_none() && script.script.is_some());
    }
}
