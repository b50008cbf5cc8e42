//! Which guests are to be protected whenever they run: a file each in `/etc/remus/domains`, and what follows from them (`decide`).
//!
//! `remus enable` writes them, `remus disable` takes them away, and so may an editor or a configuration management system.

mod decide;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::TargetSpec;
use crate::config::files::toml_files;
use crate::config::{ConfigError, Problem, parse};
use crate::protect::options::{ProtectOptions, Target};

pub use decide::{Plan, Planner, Protection, Seen, TryEnd};

/// Where they are: `NAME.toml` for the domain of that name.
pub const FOLDER: &str = "/etc/remus/domains";

/// How one domain is to be protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Where to.
    pub target: TargetSpec,
    /// How; what is left out is as for `remus protect`.
    #[serde(default)]
    pub options: ProtectOptions,
}

impl Policy {
    /// Understands the text of a file and checks its values.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let policy: Self = parse(text)?;
        let whole = |text: String| Problem { place: None, text, meant: None };
        policy.options.validate().map_err(|error| whole(error.to_string()))?;
        Target::try_from(policy.target.clone()).map_err(|error| whole(error.message))?;
        Ok(policy)
    }

    /// Where to, for people.
    #[must_use]
    pub fn label(&self) -> String {
        Target::try_from(self.target.clone()).map_or_else(|error| error.message, |target| target.label())
    }
}

/// The file of a domain's policy.
#[must_use]
pub fn path(folder: &Path, domain: &str) -> PathBuf {
    folder.join(format!("{domain}.toml"))
}

/// All policies by their domains' names, and the files that cannot be used: those domains have none.
#[must_use]
pub fn read(folder: &Path) -> (BTreeMap<String, Policy>, Vec<ConfigError>) {
    let files = match toml_files(folder) {
        Ok(files) => files,
        Err(error) => return (BTreeMap::new(), vec![error]),
    };
    let (mut found, mut errors) = (BTreeMap::new(), Vec::new());
    for path in files {
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        let policy = match std::fs::read_to_string(&path) {
            Ok(text) => Policy::parse(&text).map_err(|problem| ConfigError::format(&path, problem)),
            Err(source) => Err(ConfigError::Io { path, source }),
        };
        match policy {
            Ok(policy) => drop(found.insert(name, policy)),
            Err(error) => errors.push(error),
        }
    }
    (found, errors)
}

/// Writes a domain's policy durably, in the place of an earlier one.
///
/// # Errors
/// When the name cannot be a file's, or the file system refuses.
pub fn write(folder: &Path, domain: &str, policy: &Policy) -> std::io::Result<PathBuf> {
    let invalid = |text: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
    if domain.is_empty() || domain.starts_with('.') || domain.contains(['/', '\0']) {
        return Err(invalid(format!("{domain:?} cannot be the name of a file: name the domain, not its id or a path")));
    }
    let text = text(policy).map_err(|error| invalid(error.to_string()))?;
    std::fs::create_dir_all(folder)?;
    let path = path(folder, domain);
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    writeln!(
        file,
        "# Written by `remus enable`: {domain} is protected whenever it runs here. `remus disable {domain}` takes it away."
    )?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)?;
    std::fs::File::open(folder)?.sync_all()?;
    Ok(path)
}

/// A policy as TOML, without what is default: a later version's better default is to count.
fn text(policy: &Policy) -> Result<String, toml::ser::Error> {
    let mut file = toml::Table::try_from(policy)?;
    let default = toml::Table::try_from(ProtectOptions::default())?;
    if let Some(toml::Value::Table(options)) = file.get_mut("options") {
        options.retain(|key, value| default.get(key) != Some(value));
        if options.is_empty() {
            file.remove("options");
        }
    }
    toml::to_string(&file)
}

/// Takes a domain's policy away; `false` if there was none.
///
/// # Errors
/// What the file system says.
pub fn remove(folder: &Path, domain: &str) -> std::io::Result<bool> {
    match std::fs::remove_file(path(folder, domain)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
