//! What Debian's xendomains does to a guest behind our back (hazard F4): it boots what is linked in /etc/xen/auto, at shutdown saves
//! every domain, and at boot restores what it has saved. A host that lost a guest must not bring it up so; the gate would seal it, but
//! it should not be there at all.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::ProtectionId;

/// What xendomains is told (/etc/default/xendomains).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xendomains {
    /// Boots what is here.
    pub auto: Option<PathBuf>,
    /// Saves to here at shutdown.
    pub save: Option<PathBuf>,
    /// Restores from there at boot.
    pub restore: bool,
}

impl Xendomains {
    /// From the text of the file, as the init script's shell reads it: plain assignments.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let get = |key: &str| {
            let value = text.lines().rev().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
            let value = value.split('#').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
            (!value.is_empty()).then(|| value.to_owned())
        };
        Self {
            auto: get("XENDOMAINS_AUTO").map(Into::into),
            save: get("XENDOMAINS_SAVE").map(Into::into),
            restore: get("XENDOMAINS_RESTORE").is_some(),
        }
    }

    /// This host's. Nothing when there is no such file: the script then does nothing.
    #[must_use]
    pub fn of_host() -> Self {
        fs::read_to_string("/etc/default/xendomains").map(|text| Self::parse(&text)).unwrap_or_default()
    }
}

/// Something that starts a domain behind our back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// xendomains boots it.
    Autostart {
        /// The configuration, or a link to it.
        path: PathBuf,
    },
    /// xendomains restores it from an image that it saved earlier.
    SavedImage {
        /// The image.
        path: PathBuf,
    },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Autostart { path } => write!(
                f,
                "{} has xendomains boot it, also on a host that has lost it: remove that, or protect with --manage-autostart and \
                 remusd boots it once it has proven that it may",
                path.display()
            ),
            Self::SavedImage { path } => write!(
                f,
                "{} is an old image of it that xendomains would restore at the next boot: remove it",
                path.display()
            ),
        }
    }
}

/// What would start this domain on this host.
#[must_use]
pub fn findings(xendomains: &Xendomains, name: &str, uuid: ProtectionId) -> Vec<Finding> {
    let mut found = Vec::new();
    for path in xendomains.auto.iter().flat_map(|folder| files(folder)) {
        // A link that leads nowhere starts nothing.
        if fs::read_to_string(&path).is_ok_and(|text| is_of(&text, name, uuid)) {
            found.push(Finding::Autostart { path });
        }
    }
    if let Some(save) = xendomains.save.as_ref().filter(|_| xendomains.restore) {
        let path = save.join(name);
        if path.is_file() {
            found.push(Finding::SavedImage { path });
        }
    }
    found
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
    files.sort();
    files
}

/// Whether an xl.cfg(5) is this domain's.
fn is_of(config: &str, name: &str, uuid: ProtectionId) -> bool {
    let get = |key: &str| {
        // One line may hold more than one setting, divided by semicolons; of two for the same key xl takes the last.
        let settings = config.lines().flat_map(|line| line.split(';'));
        let mut values = settings.filter_map(|setting| {
            let value = setting.trim().strip_prefix(key)?.trim_start().strip_prefix('=')?.trim_start();
            let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''))?;
            value[1..].split(quote).next()
        });
        values.next_back()
    };
    get("name") == Some(name) || get("uuid").and_then(|text| text.parse().ok()) == Some(uuid)
}

/// An autostart entry that we keep while the domain is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Where it was.
    pub path: PathBuf,
    /// What it led to, if it was a link.
    pub link: Option<PathBuf>,
    /// What it held, if it was a file.
    pub text: Option<String>,
}

impl Kept {
    /// Reads the entry. [`remove`](Self::remove) takes it away, once this is kept durably.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(path: &Path) -> io::Result<Self> {
        let link = fs::read_link(path).ok();
        let text = if link.is_none() { Some(fs::read_to_string(path)?) } else { None };
        Ok(Self { path: path.into(), link, text })
    }

    /// Takes the entry away. Fine when it is gone.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts the entry back, unless there is one again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put_back(&self) -> io::Result<()> {
        if self.path.is_symlink() || self.path.exists() {
            return Ok(());
        }
        match (&self.link, &self.text) {
            (Some(link), _) => symlink(link, &self.path),
            (None, Some(text)) => fs::write(&self.path, text),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: ProtectionId = ProtectionId::from_u128(0xab);

    #[test]
    fn reads_debians_file() {
        let text = "# a comment\nXENDOMAINS_MIGRATE=\"\"\nXENDOMAINS_SAVE=/var/lib/xen/save\nXENDOMAINS_RESTORE=true\n\
                    #XENDOMAINS_AUTO=/nowhere\nXENDOMAINS_AUTO=/etc/xen/auto # here\n";
        let expected =
            Xendomains { auto: Some("/etc/xen/auto".into()), save: Some("/var/lib/xen/save".into()), restore: true };
        assert_eq!(Xendomains::parse(text), expected);
        assert_eq!(Xendomains::parse("XENDOMAINS_SAVE=\nXENDOMAINS_RESTORE=''"), Xendomains::default());
    }

    #[test]
    fn finds_what_boots_or_restores_this_domain_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (auto, save, cfg) = (dir.path().join("auto"), dir.path().join("save"), dir.path().join("cfg"));
        for folder in [&auto, &save, &cfg] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(cfg.join("web"), "name = \"web\"\nmemory=1").unwrap();
        symlink("../cfg/web", auto.join("10-web")).unwrap();
        fs::write(auto.join("20-db"), format!("memory=2; uuid='{UUID}'")).unwrap();
        symlink("../cfg/gone", auto.join("30-gone")).unwrap();
        fs::write(save.join("web"), "").unwrap();
        let mut host = Xendomains { auto: Some(auto.clone()), save: Some(save.clone()), restore: true };
        let other = ProtectionId::from_u128(1);
        assert_eq!(
            findings(&host, "web", other),
            [Finding::Autostart { path: auto.join("10-web") }, Finding::SavedImage { path: save.join("web") }]
        );
        assert_eq!(findings(&host, "db", UUID), [Finding::Autostart { path: auto.join("20-db") }]);
        assert_eq!(findings(&host, "we", other), []);
        fs::write(auto.join("40-twice"), "name = 'web'\nname = 'last'").unwrap();
        assert_eq!(findings(&host, "last", other), [Finding::Autostart { path: auto.join("40-twice") }]);
        fs::remove_file(auto.join("40-twice")).unwrap();
        host.restore = false;
        assert_eq!(findings(&host, "web", other).len(), 1);
    }

    #[test]
    fn a_kept_entry_goes_and_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        symlink("../cfg/web", &link).unwrap();
        fs::write(&file, "name='x'").unwrap();
        for path in [&link, &file] {
            let kept = Kept::of(path).unwrap();
            kept.remove().unwrap();
            kept.remove().unwrap();
            assert!(!path.is_symlink() && !path.exists());
            kept.put_back().unwrap();
            kept.put_back().unwrap();
            assert_eq!(Kept::of(path).unwrap(), kept);
        }
    }
}
