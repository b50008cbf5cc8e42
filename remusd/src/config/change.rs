//! What has changed between two readings of the configuration, and what of it a running daemon takes over.

use std::collections::BTreeMap;

use toml::Value;

use super::Config;

/// Settings that hold from the daemon's next start only, and why: `control.group` is none of them. A prefix ends in a dot.
const AT_RESTART: &[(&str, &str)] = &[
    ("listen.", "paired hosts know this address by heart, and open sessions would be cut"),
    ("backup.", "copies that are held have agreed to it"),
];

/// One setting that has another value than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name with its table's: `listen.port`.
    pub key: String,
    /// What it was, as TOML; `None`: not set.
    pub old: Option<String>,
    /// What it is.
    pub new: Option<String>,
    /// Why it holds only after a restart; `None`: it holds at once.
    pub after_restart: Option<&'static str>,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
        write!(f, "{}: {} -> {}", self.key, word(&self.old), word(&self.new))?;
        match self.after_restart {
            Some(why) => write!(f, " (NOT YET: from the next start of remusd on; {why})"),
            None => Ok(()),
        }
    }
}

/// Every setting that differs.
#[must_use]
pub fn changes(old: &Config, new: &Config) -> Vec<Change> {
    let (old, new) = (settings(old), settings(new));
    let keys: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let differing = keys.into_iter().filter(|key| old.get(*key) != new.get(*key));
    differing
        .map(|key| Change {
            key: key.clone(),
            old: old.get(key).cloned(),
            new: new.get(key).cloned(),
            after_restart: AT_RESTART.iter().find(|(prefix, _)| key.starts_with(prefix)).map(|(_, why)| *why),
        })
        .collect()
}

/// Every setting that has a value, by its full name.
pub(super) fn settings(config: &Config) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    if let Ok(value) = Value::try_from(config) {
        flatten("", &value, &mut found);
    }
    found
}

fn flatten(name: &str, value: &Value, found: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&name, value, found);
            }
        }
        other => {
            found.insert(name.to_owned(), other.to_string());
        }
    }
}
