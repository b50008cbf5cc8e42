//! The configuration file and its drop-ins: read in order, later ones win.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Config, ConfigError, Problem, parse};

/// What the files say together.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// The files that were read, in their order.
    pub files: Vec<PathBuf>,
}

/// The folder of a file's drop-ins: the file's name with `.d` behind it.
#[must_use]
pub fn drop_ins(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".d");
    name.into()
}

impl Loaded {
    /// Reads the file and then `*.toml` of its drop-in folder in the order of their names. What is not there says nothing. Each file
    /// has to be right by itself, so that an error names one file and a line of it.
    ///
    /// # Errors
    /// Every file that cannot be used.
    pub fn read(path: &Path) -> Result<Self, Vec<ConfigError>> {
        let (mut files, mut errors, mut all) = (Vec::new(), Vec::new(), Table::new());
        let mut candidates = vec![path.to_owned()];
        match toml_files(&drop_ins(path)) {
            Ok(more) => candidates.extend(more),
            Err(error) => errors.push(error),
        }
        for path in candidates {
            match table(&path) {
                Ok(Some(table)) => {
                    merge(&mut all, table);
                    files.push(path);
                }
                Ok(None) => {}
                Err(error) => errors.push(error),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        match Value::Table(all).try_into::<Config>() {
            Ok(config) => Ok(Self { config, files }),
            // Each was right by itself, and no setting depends on another.
            Err(error) => {
                let problem = Problem { place: None, text: error.message().to_owned(), meant: None };
                Err(vec![ConfigError::format(path, problem)])
            }
        }
    }
}

/// The TOML files of a folder in the order of their names; none if there is no such folder.
///
/// # Errors
/// [`ConfigError::Io`].
pub(crate) fn toml_files(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let io = |source| ConfigError::Io { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        // Editors' and packages' leftovers (.swp, .dpkg-old, .#x.toml) say nothing.
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|end| end == "toml") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn table(path: &Path) -> Result<Option<Table>, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ConfigError::Io { path: path.to_owned(), source }),
    };
    let of = |problem| ConfigError::format(path, problem);
    parse::<Config>(&text).map_err(of)?;
    parse::<Table>(&text).map(Some).map_err(of)
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}
