//! Reads the configuration anew while the daemon runs, and takes over what can be.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::config::{Change, Config, Loaded, changes};

/// Has one part of the daemon take over a configuration; the error is a sentence.
pub type Apply = Box<dyn Fn(&Config) -> Result<(), String> + Send + Sync>;

/// The configuration of a running daemon.
pub struct Live {
    path: PathBuf,
    /// As it holds: what has to wait for a restart still has its old value here, so that it is told again each time.
    holds: Mutex<Config>,
    /// By the prefix of the settings that each is for.
    apply: Vec<(&'static str, Apply)>,
}

impl Live {
    /// With the configuration that the daemon was started with, and who takes over which settings.
    #[must_use]
    pub fn new(path: PathBuf, config: Config, apply: Vec<(&'static str, Apply)>) -> Self {
        Self { path, holds: Mutex::new(config), apply }
    }

    /// Reads the files anew and takes over what can be. Returns what has changed, a sentence each.
    ///
    /// # Errors
    /// What is wrong in the files, a sentence each; everything stays as it was.
    pub fn reload(&self) -> Result<Vec<String>, Vec<String>> {
        let loaded =
            Loaded::read(&self.path).map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = changes(&holds, &loaded.config);
        let mut told: Vec<_> = changes.iter().map(Change::to_string).collect();
        let now: Vec<_> = changes.iter().filter(|change| change.after_restart.is_none()).collect();
        for (prefix, apply) in &self.apply {
            if now.iter().any(|change| change.key.starts_with(prefix))
                && let Err(text) = apply(&loaded.config)
            {
                told.push(format!("{prefix}* was NOT taken over: {text}"));
            }
        }
        let Config { listen, backup, .. } = holds.clone();
        *holds = Config { listen, backup, ..loaded.config };
        Ok(told)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_can_be_is_taken_over_once_and_the_rest_is_told_until_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("remusd.toml");
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let log = seen.clone();
        let apply: Apply = Box::new(move |config| {
            log.lock().unwrap().push(config.log.filter.clone());
            if config.log.filter == "warn" { Err("no".into()) } else { Ok(()) }
        });
        let live = Live::new(path.clone(), Config::default(), vec![("log.", apply)]);
        assert_eq!(live.reload(), Ok(vec![]));

        std::fs::write(&path, "[log]\nfilter = \"debug\"\n[listen]\nport = 7001\n").unwrap();
        let told = live.reload().unwrap();
        assert_eq!((told.len(), &*seen.lock().unwrap()), (2, &vec!["debug".to_owned()]), "{told:?}");
        let told = live.reload().unwrap();
        assert!(told.len() == 1 && told[0].contains("listen.port") && told[0].contains("NOT YET"), "{told:?}");
        assert_eq!(seen.lock().unwrap().len(), 1, "not again");

        std::fs::write(&path, "[log]\nfiltre = \"info\"\n").unwrap();
        let wrong = live.reload().unwrap_err();
        assert!(wrong[0].contains("did you mean `filter`?"), "{wrong:?}");
        assert_eq!(seen.lock().unwrap().len(), 1, "a wrong file changes nothing");

        std::fs::write(&path, "[log]\nfilter = \"warn\"\n").unwrap();
        let told = live.reload().unwrap();
        assert!(told.last().unwrap().contains("NOT taken over: no"), "{told:?}");
    }
}
