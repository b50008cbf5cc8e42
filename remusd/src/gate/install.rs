//! Putting the gate's hotplug script in front of the host's own, and taking it away again.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::config::{self, GATE};

/// The script, as it is installed.
pub const SCRIPT: &str = include_str!("../../../scripts/vif-remus");

const KEY: &str = "vif.default.script";
const NOTE: &str = "# Set by `remus gate install`; `remus gate remove` puts back what was here.";
const ASIDE: &str = "#remus gate#";

/// The gate cannot be put in place or taken away.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The file system refused.
    #[error("{path}: {source}; this must run as root in a dom0 with Xen's scripts (xen-utils-common on Debian)")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The default script is one that the gate cannot go on as.
    #[error(
        "{conf} makes {script} the default vif script, which the gate cannot go on as: move it to {} as vif-NAME",
        config::SCRIPTS
    )]
    Foreign {
        /// Which file.
        conf: PathBuf,
        /// Its script.
        script: String,
    },
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Xen's scripts.
    pub scripts: PathBuf,
    /// xl's own configuration.
    pub xl_conf: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { scripts: config::SCRIPTS.into(), xl_conf: "/etc/xen/xl.conf".into() }
    }
}

/// How the gate stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The script is there, and is this version's.
    pub script: bool,
    /// Names under which other scripts should be reachable and are not.
    pub missing: Vec<String>,
    /// The default script that xl.conf gives to guests that name none.
    pub default: String,
}

impl Status {
    /// Whether every guest that names no script of its own, or one of Xen's through the gate, is gated.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.script && self.missing.is_empty() && config::is_gate(&self.default)
    }
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> InstallError + '_ {
    move |source| InstallError::Io { path: path.into(), source }
}

impl Places {
    /// How the gate stands.
    ///
    /// # Errors
    /// [`InstallError::Io`].
    pub fn status(&self) -> Result<Status, InstallError> {
        let script = self.scripts.join(GATE);
        let same = fs::read_to_string(&script).is_ok_and(|text| text == SCRIPT)
            && fs::metadata(&script).is_ok_and(|meta| meta.permissions().mode() & 0o111 == 0o111);
        let missing = self.links()?.into_iter().filter(|name| !self.scripts.join(name).exists()).collect();
        let conf = self.conf()?;
        let default = conf.lines().rev().find_map(value).unwrap_or("vif-bridge").to_owned();
        Ok(Status { script: same, missing, default })
    }

    /// Puts it in place: the script, a link to it for each script that it can go on as, and as xl's default. Again is fine. Guests get it
    /// with their next vif. Returns what was changed, one sentence each.
    ///
    /// # Errors
    /// [`InstallError`]; what was done before stays and does no harm.
    pub fn install(&self) -> Result<Vec<String>, InstallError> {
        let mut done = Vec::new();
        let status = self.status()?;
        let wanted = config::gated(&status.default)
            .ok_or_else(|| InstallError::Foreign { conf: self.xl_conf.clone(), script: status.default.clone() })?;
        if !status.script {
            let script = self.scripts.join(GATE);
            replace(&script, SCRIPT, 0o755)?;
            done.push(format!("{} is this version's", script.display()));
        }
        for name in status.missing {
            let link = self.scripts.join(&name);
            // A dangling link exists as far as symlink() cares.
            let _ = fs::remove_file(&link);
            symlink(GATE, &link).map_err(io_at(&link))?;
            done.push(format!("{} leads to it", link.display()));
        }
        if !config::is_gate(&status.default) {
            let mut text = String::new();
            for line in self.conf()?.lines() {
                let aside = if value(line).is_some() { ASIDE } else { "" };
                text += &format!("{aside}{line}\n");
            }
            text += &format!("{NOTE}\n{KEY}=\"{wanted}\"\n");
            replace(&self.xl_conf, &text, 0o644)?;
            done.push(format!("{} makes {wanted} the default", self.xl_conf.display()));
        }
        Ok(done)
    }

    /// Takes it out of xl's configuration and puts back what was there; then, unless `in_use`, removes the script and its links. Again is
    /// fine. Returns what was changed.
    ///
    /// # Errors
    /// [`InstallError::Io`].
    pub fn remove(&self, in_use: bool) -> Result<Vec<String>, InstallError> {
        let mut done = Vec::new();
        let conf = self.conf()?;
        if conf.lines().any(|line| line == NOTE) {
            let mut text = String::new();
            let mut lines = conf.lines();
            while let Some(line) = lines.next() {
                if line == NOTE {
                    lines.next();
                    continue;
                }
                text += line.strip_prefix(ASIDE).unwrap_or(line);
                text.push('\n');
            }
            if text.is_empty() {
                fs::remove_file(&self.xl_conf).map_err(io_at(&self.xl_conf))?;
            } else {
                replace(&self.xl_conf, &text, 0o644)?;
            }
            done.push(format!("{} is as it was", self.xl_conf.display()));
        }
        if in_use {
            return Ok(done);
        }
        for entry in fs::read_dir(&self.scripts).map_err(io_at(&self.scripts))?.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(config::is_gate)
                && (path.is_symlink() && fs::read_link(&path).is_ok_and(|to| to == Path::new(GATE)) || name == GATE);
            if ours {
                fs::remove_file(&path).map_err(io_at(&path))?;
                done.push(format!("{} is removed", path.display()));
            }
        }
        Ok(done)
    }

    /// The names that scripts should be reachable by through the gate.
    fn links(&self) -> Result<Vec<String>, InstallError> {
        let mut names: Vec<String> = fs::read_dir(&self.scripts)
            .map_err(io_at(&self.scripts))?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            // vif-common.sh is sourced by the others, vif-setup called by udev; folders of hooks end with ".d".
            .filter(|name| !config::is_gate(name) && !name.contains('.') && name != "vif-setup")
            .filter_map(|name| config::gated(&name))
            .collect();
        names.sort();
        Ok(names)
    }

    fn conf(&self) -> Result<String, InstallError> {
        match fs::read_to_string(&self.xl_conf) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(io_at(&self.xl_conf)),
        }
    }
}

/// The default script, if this line of xl.conf(5) sets it. The last one counts.
fn value(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix(KEY)?.trim_start().strip_prefix('=')?.trim_start();
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    rest[1..].split(quote).next()
}

/// Writes a file as a whole.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), InstallError> {
    let fresh = path.with_extension("remus-new");
    fs::write(&fresh, text).map_err(io_at(&fresh))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)).map_err(io_at(&fresh))?;
    fs::rename(&fresh, path).map_err(io_at(path))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn host(conf: Option<&str>) -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { scripts: dir.path().join("scripts"), xl_conf: dir.path().join("xl.conf") };
        fs::create_dir(&places.scripts).unwrap();
        for name in ["block", "vif-bridge", "vif-openvswitch", "vif-setup", "vif-common.sh"] {
            fs::write(places.scripts.join(name), name).unwrap();
        }
        if let Some(conf) = conf {
            fs::write(&places.xl_conf, conf).unwrap();
        }
        (dir, places)
    }

    fn files(places: &Places) -> BTreeMap<PathBuf, String> {
        let scripts = fs::read_dir(&places.scripts).unwrap().map(|entry| entry.unwrap().path());
        scripts
            .chain([places.xl_conf.clone()])
            .filter_map(|path| Some((path.clone(), fs::read_to_string(path).ok()?)))
            .collect()
    }

    #[test]
    fn it_comes_and_goes_without_a_trace_whatever_xl_conf_says() {
        let confs = [
            (None, "vif-bridge"),
            (Some("# mine\nclaim_mode=1\n"), "vif-bridge"),
            (
                Some(
                    "vif.default.script = 'vif-nat'\n#vif.default.script=\"x\"\nvif.default.script=\"vif-openvswitch\"\n",
                ),
                "vif-openvswitch",
            ),
        ];
        for (conf, default) in confs {
            let (_dir, places) = host(conf);
            let before = files(&places);
            assert_eq!(places.status().unwrap().default, default);
            assert!(!places.status().unwrap().complete());
            assert!(!places.install().unwrap().is_empty());
            let status = places.status().unwrap();
            assert!(status.complete(), "{status:?}");
            assert_eq!(Some(status.default), config::gated(default));
            let installed = files(&places);
            assert!(installed.contains_key(&places.scripts.join("vif-remus-openvswitch")));
            assert!(!installed.contains_key(&places.scripts.join("vif-remus-setup")));
            assert_eq!(places.install().unwrap(), Vec::<String>::new());
            assert_eq!(files(&places), installed);
            // In use: the scripts stay, nobody new gets them.
            places.remove(true).unwrap();
            assert_eq!(places.status().unwrap().default, default);
            assert!(places.status().unwrap().script);
            places.install().unwrap();
            places.remove(false).unwrap();
            assert_eq!(files(&places), before, "{conf:?}");
            assert_eq!(places.remove(false).unwrap(), Vec::<String>::new());
        }
    }

    #[test]
    fn an_older_script_is_replaced_and_a_foreign_default_refused() {
        let (_dir, places) = host(Some("vif.default.script=\"/opt/mine\"\n"));
        let error = places.install().unwrap_err().to_string();
        assert!(error.contains("/opt/mine"), "{error}");
        fs::write(&places.xl_conf, "").unwrap();
        fs::write(places.scripts.join(GATE), "old").unwrap();
        places.install().unwrap();
        assert_eq!(fs::read_to_string(places.scripts.join(GATE)).unwrap(), SCRIPT);
    }
}
