//! A device-mapper device that a guest has as its disk, moved onto the mirror and off it while the guest runs (hazard F20).
//!
//! What its table says when the disk is made becomes a device of its own, `remus-NAME`: that is where the mirror's service works. The
//! guest's device gets a table that leads to the mirror's block device. A disk that is closed gets a table of errors: whatever
//! reached the device below past the mirror would be unknown to the marks.
//!
//! `dmsetup resume` puts a loaded table in place in one ioctl, requests under way ended and later ones waiting (`do_resume` in the
//! kernel's drivers/md/dm-ioctl.c), so that no process of ours is needed while the guest waits.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Bytes of a sector, device-mapper's unit.
const SECTOR: u64 = 512;

/// The guest's device cannot be moved.
#[derive(Debug, thiserror::Error)]
pub enum MapperError {
    /// The tool is missing, or cannot be run.
    #[error("dmsetup cannot be run ({0}): install the package dmsetup")]
    Run(io::Error),
    /// It said no.
    #[error("dmsetup {what}: {said}")]
    Refused {
        /// What it was asked for.
        what: String,
        /// Its words.
        said: String,
    },
    /// No device-mapper device.
    #[error("{0} is not a device-mapper device: give the mirror the device itself, and the guest /dev/remus/NAME")]
    NotMapped(PathBuf),
    /// What was below is not known any more.
    #[error(
        "{node} leads to {table:?}, and the device {below} that was below it is gone: load its own table again (for a logical volume, \
         `lvchange --refresh`), and then start the disk's service"
    )]
    Lost {
        /// The guest's device.
        node: PathBuf,
        /// Its table.
        table: String,
        /// The device below.
        below: String,
    },
    /// The mirror has another size.
    #[error("{node} has {size} bytes and the mirror {mirror}: they have to be the same")]
    Size {
        /// The guest's device.
        node: PathBuf,
        /// Its size.
        size: u64,
        /// The mirror's.
        mirror: u64,
    },
    /// Its size is not told.
    #[error("{node}: {source}")]
    Device {
        /// The guest's device.
        node: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The guest's device above a mirrored disk. All calls run `dmsetup` and block until it has ended.
#[derive(Debug)]
pub struct Mapped {
    program: PathBuf,
    node: PathBuf,
    /// Device-mapper's name of it.
    name: String,
    /// Device-mapper's name of what is below the mirror.
    below: String,
}

/// Device-mapper's name of the device below the mirrored disk `disk`.
#[must_use]
pub fn name_below(disk: &str) -> String {
    format!("remus-{disk}")
}

impl Mapped {
    /// The device `node` of the mirrored disk `disk`. Changes nothing.
    ///
    /// # Errors
    /// [`MapperError`]: above all, that it is no device-mapper device.
    pub fn open(node: &Path, disk: &str) -> Result<Self, MapperError> {
        Self::with("dmsetup".into(), node, disk)
    }

    fn with(program: PathBuf, node: &Path, disk: &str) -> Result<Self, MapperError> {
        let mut mapped = Self { program, node: node.to_owned(), name: String::new(), below: name_below(disk) };
        let path = node.display().to_string();
        mapped.name = match mapped.ask(&["info", "-c", "--noheadings", "-o", "name", &path]) {
            Ok(name) => name.trim().to_owned(),
            Err(MapperError::Refused { .. }) => return Err(MapperError::NotMapped(node.to_owned())),
            Err(other) => return Err(other),
        };
        Ok(mapped)
    }

    /// The guest's device.
    #[must_use]
    pub fn node(&self) -> &Path {
        &self.node
    }

    fn run(&self, args: &[&str], input: &str) -> Result<String, MapperError> {
        let mut child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(MapperError::Run)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not want it says why below.
            drop(stdin.write_all(input.as_bytes()));
        }
        let output = child.wait_with_output().map_err(MapperError::Run)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(MapperError::Refused { what: args.join(" "), said })
    }

    fn ask(&self, args: &[&str]) -> Result<String, MapperError> {
        self.run(args, "")
    }

    /// Makes the device below the mirror, unless it is there, of what the guest's device leads to. The guest's device stays as it is.
    ///
    /// # Errors
    /// [`MapperError::Lost`] when the guest's device leads to the mirror, or to errors, and nobody knows what was below.
    pub fn prepare(&self) -> Result<(), MapperError> {
        if self.ask(&["info", &self.below]).is_ok() {
            return Ok(());
        }
        let table = self.ask(&["table", &self.name])?;
        let ours = self.leads_to()?.iter().any(|device| device.starts_with("nbd"));
        if ours || table.split_whitespace().nth(2) == Some("error") {
            let (node, below) = (self.node.clone(), self.below.clone());
            return Err(MapperError::Lost { node, table: table.trim().to_owned(), below });
        }
        self.run(&["create", &self.below], &table)?;
        // Where no udev makes the node.
        self.ask(&["mknodes", &self.below]).map(drop)
    }

    /// Names of the devices that its table leads to, such as `nbd0`.
    fn leads_to(&self) -> Result<Vec<String>, MapperError> {
        // "1 dependencies  : (nbd0)"
        let said = self.ask(&["deps", "-o", "devname", &self.name])?;
        Ok(said.split(['(', ')']).skip(1).step_by(2).map(str::to_owned).collect())
    }

    fn size(&self) -> Result<u64, MapperError> {
        let size = File::open(&self.node).and_then(|mut file| file.seek(SeekFrom::End(0)));
        size.map_err(|source| MapperError::Device { node: self.node.clone(), source })
    }

    fn switch(&self, table: &str) -> Result<(), MapperError> {
        self.run(&["load", "--noudevsync", &self.name], table)?;
        match self.ask(&["resume", "--noudevsync", &self.name]) {
            Ok(_) => Ok(()),
            Err(error) => {
                // Or a later resume by somebody else would put it in place.
                drop(self.ask(&["clear", &self.name]));
                Err(error)
            }
        }
    }

    /// Moves the guest's device onto `/dev/nbd<index>`, a mirror of `size` bytes. Does nothing if it is there.
    ///
    /// # Errors
    /// [`MapperError`]; the device then is where it was.
    pub fn onto(&self, index: u32, size: u64) -> Result<(), MapperError> {
        let nbd = format!("nbd{index}");
        if self.leads_to()? == [nbd.as_str()] {
            return Ok(());
        }
        let own = self.size()?;
        if own != size {
            return Err(MapperError::Size { node: self.node.clone(), size: own, mirror: size });
        }
        self.switch(&format!("0 {} linear /dev/{nbd} 0\n", size / SECTOR))
    }

    /// Has every request to the guest's device fail.
    ///
    /// # Errors
    /// [`MapperError`]; the device then is where it was.
    pub fn cut(&self) -> Result<(), MapperError> {
        self.switch(&format!("0 {} error\n", self.size()? / SECTOR))
    }

    /// Gives the guest's device what it led to at first.
    ///
    /// # Errors
    /// [`MapperError`]; the device then is where it was.
    pub fn straight(&self) -> Result<(), MapperError> {
        self.switch(&self.ask(&["table", &self.below])?)
    }
}

/// Removes the device below a mirrored disk, which is used by nobody any more. Does nothing if it is not there.
///
/// # Errors
/// [`MapperError`]: it is still used.
pub fn remove_below(disk: &str) -> Result<(), MapperError> {
    let (program, below) = (PathBuf::from("dmsetup"), name_below(disk));
    let tool = Mapped { program, node: PathBuf::new(), name: String::new(), below };
    match tool.ask(&["info", &tool.below]) {
        Ok(_) => tool.ask(&["remove", &tool.below]).map(drop),
        Err(MapperError::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A dmsetup that keeps tables in files and notes what it is asked.
    struct Tool(tempfile::TempDir);

    impl Tool {
        fn new(table: &str) -> Self {
            let tool = Self(tempfile::tempdir().unwrap());
            std::fs::write(tool.path("table-vg-root"), table).unwrap();
            std::fs::write(tool.path("node"), vec![0; 8 * SECTOR as usize]).unwrap();
            let text = format!(
                r#"#!/bin/sh
cd {dir}
echo "$*" >>asked
for last; do :; done
case $1 in
info) [ "$2" = -c ] && {{ echo vg-root; exit 0; }}; [ -e "table-$last" ] || {{ echo "Device $last not found" >&2; exit 1; }} ;;
table) cat "table-$last" ;;
deps) sed -n 's|.*linear /dev/\(.*\) .*|1 dependencies  : (\1)|p' "table-$last" ;;
create) cat >"table-$last" ;;
load) cat >"new-$last" ;;
resume) [ -e refuse ] && {{ echo busy >&2; exit 1; }}; mv "new-$last" "table-$last" ;;
clear) rm -f "new-$last" ;;
esac
"#,
                dir = tool.0.path().display()
            );
            std::fs::write(tool.path("new"), text).unwrap();
            std::fs::set_permissions(tool.path("new"), PermissionsExt::from_mode(0o755)).unwrap();
            std::fs::rename(tool.path("new"), tool.path("dmsetup")).unwrap();
            tool
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn table(&self, name: &str) -> String {
            std::fs::read_to_string(self.path(&format!("table-{name}"))).unwrap()
        }

        fn mapped(&self) -> Mapped {
            Mapped::with(self.path("dmsetup"), &self.path("node"), "d").unwrap()
        }
    }

    const ORIGINAL: &str = "0 4 linear /dev/sda1 2048\n4 4 linear /dev/sdb1 0\n";

    #[test]
    fn a_device_goes_onto_the_mirror_is_cut_and_goes_back() {
        let tool = Tool::new(ORIGINAL);
        let mapped = tool.mapped();
        mapped.prepare().unwrap();
        assert_eq!((tool.table("vg-root"), tool.table("remus-d")), (ORIGINAL.into(), ORIGINAL.into()));
        mapped.onto(3, 8 * SECTOR).unwrap();
        assert_eq!(tool.table("vg-root"), "0 8 linear /dev/nbd3 0\n");
        let asked = || std::fs::read_to_string(tool.path("asked")).unwrap();
        let loads = asked().matches("load ").count();
        mapped.onto(3, 8 * SECTOR).unwrap();
        assert_eq!(asked().matches("load ").count(), loads, "it is there already");
        // A restarted service finds what is below.
        mapped.prepare().unwrap();
        assert_eq!(tool.table("remus-d"), ORIGINAL);
        mapped.cut().unwrap();
        assert_eq!(tool.table("vg-root"), "0 8 error\n");
        mapped.straight().unwrap();
        assert_eq!(tool.table("vg-root"), ORIGINAL);
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let tool = Tool::new(ORIGINAL);
        let mapped = tool.mapped();
        mapped.prepare().unwrap();
        assert!(matches!(mapped.onto(3, 16 * SECTOR), Err(MapperError::Size { .. })));
        std::fs::write(tool.path("refuse"), "").unwrap();
        assert!(matches!(mapped.onto(3, 8 * SECTOR), Err(MapperError::Refused { .. })));
        assert_eq!(tool.table("vg-root"), ORIGINAL);
        assert!(!tool.path("new-vg-root").exists(), "a table that nobody wants any more is left loaded");

        let tool = Tool::new("0 8 linear /dev/nbd3 0\n");
        let error = tool.mapped().prepare().unwrap_err();
        assert!(matches!(error, MapperError::Lost { .. }), "{error}");
        assert!(!tool.path("table-remus-d").exists());
        let error = Tool::new("0 8 error\n").mapped().prepare().unwrap_err();
        assert!(matches!(error, MapperError::Lost { .. }), "{error}");

        let missing = Mapped::with("/nonexistent/dmsetup".into(), Path::new("/dev/null"), "d").unwrap_err();
        assert!(matches!(missing, MapperError::Run(_)), "{missing}");
    }
}
