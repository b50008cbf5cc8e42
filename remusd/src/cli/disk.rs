//! `remus disk`: mirrored disks, by talking to their services (docs/disks.md). The daemon is not asked: a disk's service outlives it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand};
use devices::mirror::client::{ClientError, DiskClient, RUN};
use devices::mirror::io::{name_below, remove_below};
use devices::mirror::service::Status;

use super::args::Notify;
use crate::api::{ApiError, ErrorCode};
use crate::ops::Backoff;

/// What can be done to mirrored disks.
#[derive(Debug, Args)]
pub struct Disk {
    /// Which of it.
    #[command(subcommand)]
    pub command: DiskCommand,
}

/// The subcommands of `remus disk`.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Set a mirrored disk up on this host, and start its service. On both hosts, under the same name.
    Create {
        /// Its name: letters, digits, '-', '_' and '.'.
        name: String,
        /// The block device or file that it lives on, of the same size on both hosts.
        #[arg(required_unless_present = "above", conflicts_with = "above")]
        backing: Option<PathBuf>,
        /// In place of BACKING: a device-mapper device (a logical volume) that a guest has as its disk, running or not. It is moved onto
        /// the mirror, which lives on what the device led to.
        #[arg(long, value_name = "DEVICE")]
        above: Option<PathBuf>,
        /// The N of the /dev/nbdN that is to be this disk's.
        #[arg(long, value_name = "N")]
        nbd: u32,
        /// Its metadata file, on another disk [default: /var/lib/remus/disk/NAME.meta].
        #[arg(long, value_name = "PATH")]
        meta: Option<PathBuf>,
        /// How the copy is reached, a shell command [default: by ssh, where the guest is protected to].
        #[arg(long, value_name = "COMMAND")]
        via: Option<String>,
        /// Memory for writes on their way, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(8..=65536))]
        capacity: u64,
        /// What a copy may hold on disk beyond that memory, in MiB, beside its metadata: set aside at once. 0 for none.
        #[arg(long, value_name = "MIB", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=1 << 24))]
        journal_size: u64,
        /// This host has the contents, and the guest runs here; without it this host has the copy, which is OVERWRITTEN.
        #[arg(long)]
        source: bool,
    },
    /// Give the disk to guests of this host: afterwards it can be named in their configuration.
    Attach {
        /// The disk.
        name: String,
        /// This host's copy becomes the one. I have made sure that no guest uses the other.
        #[arg(long)]
        take_over: bool,
    },
    /// Take the disk away from guests of this host.
    Detach {
        /// The disk.
        name: String,
    },
    /// This host's copy may be OVERWRITTEN: it follows the other host's from now on.
    Demote {
        /// The disk.
        name: String,
    },
    /// Make it an ordinary disk again, with the contents that it has. A guest's device-mapper device is moved off the mirror while the
    /// guest runs; any other disk has to be detached before.
    Remove {
        /// The disk.
        name: String,
    },
    /// Compare both copies while the disk is used, from the host that has the source; fails if they differ, and has that repaired.
    Verify {
        /// The disk.
        name: String,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Show the disks of this host, or one of them.
    Status {
        /// The disk.
        name: Option<String>,
    },
}

/// Where the configuration of disks is, one file each.
const CONFIG: &str = "/etc/remus/disk";
/// Where metadata is unless somebody says otherwise.
const STATE: &str = "/var/lib/remus/disk";
/// Where the service's words go on a host without systemd.
const LOGS: &str = "/var/log/remus";
/// How long a service may take to answer for the first time.
const START: Duration = Duration::from_secs(20);

fn failed(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Failed, error.to_string())
}

fn client(name: &str) -> DiskClient {
    DiskClient::new(Path::new(RUN), name)
}

fn client_error(error: &ClientError) -> ApiError {
    let code = match error {
        ClientError::Unreachable { .. } | ClientError::Timeout { .. } => ErrorCode::Failed,
        ClientError::Refused { .. } => ErrorCode::Conflict,
    };
    ApiError::new(code, error.to_string())
}

/// Does it; the answer is a text, or what `--json` shows.
///
/// # Errors
/// [`ApiError`].
pub async fn run(disk: &Disk) -> Result<serde_json::Value, ApiError> {
    let message = |text: String| Ok(serde_json::json!({ "message": text }));
    match &disk.command {
        DiskCommand::Create { name, backing, above, nbd, meta, via, capacity, journal_size, source } => {
            check_name(name)?;
            let meta = meta.clone().unwrap_or_else(|| Path::new(STATE).join(format!("{name}.meta")));
            let above = above.as_deref().map(absolute).transpose()?;
            // The service makes that device.
            let below = Path::new("/dev/mapper").join(name_below(name));
            let settings = Settings {
                backing: &absolute(backing.as_deref().unwrap_or(&below))?,
                above: above.as_deref(),
                meta: &absolute(&meta)?,
                nbd: *nbd,
                via: via.as_deref(),
                capacity: *capacity,
                journal_size: *journal_size,
            };
            create(name, &settings)?;
            answering(name).await?;
            if *source {
                let attached = attach(name, false).await?;
                return message(match above {
                    Some(device) => format!(
                        "{} leads to the mirrored disk {name} now, for guests that have it too",
                        device.display()
                    ),
                    None => attached,
                });
            }
            client(name).demote().await.map_err(|error| client_error(&error))?;
            message(format!(
                "disk {name} is a copy and will be overwritten; on the other host: `remus disk create {name} BACKING --nbd N --source`"
            ))
        }
        DiskCommand::Attach { name, take_over } => message(attach(name, *take_over).await?),
        DiskCommand::Detach { name } => {
            client(name).close().await.map_err(|error| client_error(&error))?;
            message(format!("disk {name} is closed"))
        }
        DiskCommand::Demote { name } => {
            client(name).demote().await.map_err(|error| client_error(&error))?;
            message(format!("disk {name} is a copy now and follows whoever connects"))
        }
        DiskCommand::Remove { name } => {
            remove(name).await?;
            message(format!("disk {name} is no mirrored disk any more; its contents are where they were"))
        }
        DiskCommand::Verify { .. } => Err(ApiError::new(ErrorCode::Invalid, "comparing is the daemon's work")),
        DiskCommand::Status { name } => {
            let names = match name {
                Some(name) => vec![name.clone()],
                None => known()?,
            };
            let mut rows = Vec::new();
            for name in names {
                rows.push(client(&name).status().await.map_err(|error| client_error(&error))?);
            }
            serde_json::to_value(rows).map_err(|error| failed(&error))
        }
    }
}

/// The names of the disks that have sockets here.
fn known() -> Result<Vec<String>, ApiError> {
    let entries = match std::fs::read_dir(RUN) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&format!("{RUN}: {error}"))),
    };
    let names =
        entries.flatten().filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".ctl")?.to_owned()));
    let mut names: Vec<_> = names.collect();
    names.sort();
    Ok(names)
}

async fn attach(name: &str, take_over: bool) -> Result<String, ApiError> {
    let mut disk = client(name);
    let status = disk.status().await.map_err(|error| client_error(&error))?;
    match status.role.as_str() {
        "source" => {}
        "target" if !take_over => {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "disk {name} is the copy on this host; if no guest uses the other host's disk any more, `remus disk attach {name} \
                     --take-over` makes this one the source"
                ),
            ));
        }
        _ => disk.promote(false).await.map_err(|error| client_error(&error))?,
    }
    disk.open().await.map_err(|error| client_error(&error))?;
    let link = disk.attach(None).await.map_err(|error| client_error(&error))?;
    Ok(format!("in the guest's configuration: disk = [ 'phy:{},xvda,w' ]", link.display()))
}

/// The service lets go first: until then nothing has changed, and afterwards nothing is lost by trying again.
async fn remove(name: &str) -> Result<(), ApiError> {
    check_name(name)?;
    let path = Path::new(CONFIG).join(format!("{name}.env"));
    let text = std::fs::read_to_string(&path).map_err(|error| failed(&format!("{}: {error}", path.display())))?;
    client(name).leave().await.map_err(|error| client_error(&error))?;
    if Path::new("/run/systemd/system").is_dir() {
        let status = Command::new("systemctl").args(["disable", "--now", &format!("remus-disk@{name}")]).status();
        let status = status.map_err(|error| failed(&format!("systemctl: {error}")))?;
        if !status.success() {
            return Err(failed(&format!("systemctl disable --now remus-disk@{name}: {status}")));
        }
    } else {
        client(name).quit().await.map_err(|error| client_error(&error))?;
    }
    // A killed service's lock on the device below ends with its last request.
    let mut backoff =
        Backoff::new(Duration::from_millis(20), Duration::from_millis(500), START).map_err(|e| failed(&e))?;
    while let Err(error) = remove_below(name) {
        backoff.wait().await.map_err(|_| failed(&error))?;
    }
    // Another disk of this name must not take over what this one knew.
    let meta = value_of(&text, "META").map(PathBuf::from);
    let journal = meta.as_ref().map(|meta| meta.with_file_name(format!("{name}.journal")));
    for file in meta.into_iter().chain(journal).chain([path]) {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(&format!("{}: {error}", file.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A value of an environment file that [`environment`] wrote.
fn value_of(text: &str, key: &str) -> Option<String> {
    let quoted = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix("=\"")?.strip_suffix('"'))?;
    let (mut value, mut escaped) = (String::new(), false);
    for c in quoted.chars() {
        match c {
            '\\' if !escaped => escaped = true,
            c => {
                value.push(c);
                escaped = false;
            }
        }
    }
    Some(value)
}

struct Settings<'a> {
    backing: &'a Path,
    above: Option<&'a Path>,
    meta: &'a Path,
    nbd: u32,
    via: Option<&'a str>,
    capacity: u64,
    journal_size: u64,
}

/// The environment file of `remus-disk@NAME`. systemd takes what stands between double quotes, with `\` before `"`, `\`, `$` and backquote.
fn environment(settings: &Settings<'_>) -> String {
    let quote = |value: &str| {
        let mut quoted = String::from("\"");
        for c in value.chars() {
            if "\"\\$`".contains(c) {
                quoted.push('\\');
            }
            quoted.push(c);
        }
        quoted.push('"');
        quoted
    };
    let Settings { backing, above, meta, nbd, via, capacity, journal_size } = settings;
    format!(
        "BACKING={}\nABOVE={}\nMETA={}\nNBD={nbd}\nVIA={}\nCAPACITY={capacity}\nJOURNAL_SIZE={journal_size}\n",
        quote(&backing.display().to_string()),
        quote(&above.map(|device| device.display().to_string()).unwrap_or_default()),
        quote(&meta.display().to_string()),
        quote(via.unwrap_or_default()),
    )
}

/// Writes the configuration and starts the service.
fn create(name: &str, settings: &Settings<'_>) -> Result<(), ApiError> {
    let path = Path::new(CONFIG).join(format!("{name}.env"));
    if path.exists() {
        let text = format!("{} exists already: remove it if that disk is no more", path.display());
        return Err(ApiError::new(ErrorCode::Conflict, text));
    }
    for dir in [Some(Path::new(CONFIG)), settings.meta.parent()].into_iter().flatten() {
        std::fs::create_dir_all(dir).map_err(|error| failed(&format!("{}: {error}", dir.display())))?;
    }
    // A power loss must not leave a disk that nobody serves.
    let written = std::fs::File::create(&path).and_then(|mut file| {
        file.write_all(environment(settings).as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| failed(&format!("{}: {error}", path.display())))?;
    let started = if Path::new("/run/systemd/system").is_dir() {
        let status = Command::new("systemctl").args(["enable", "--now", &format!("remus-disk@{name}")]).status();
        status.and_then(|s| if s.success() { Ok(()) } else { Err(std::io::Error::other(format!("systemctl: {s}"))) })
    } else {
        start(name, settings)
    };
    started.map_err(|error| {
        // Nothing is left of it: it can be tried again.
        drop(std::fs::remove_file(&path));
        failed(&format!("starting remus-disk of {name}: {error}"))
    })
}

/// Runs the service in a session of its own, on a host without systemd.
fn start(name: &str, settings: &Settings<'_>) -> std::io::Result<()> {
    std::fs::create_dir_all(LOGS)?;
    let log =
        std::fs::File::options().create(true).append(true).open(Path::new(LOGS).join(format!("disk-{name}.log")))?;
    let mut command = Command::new("setsid");
    command.args(["--fork", "remus-disk", "serve", name, "--nbd", &settings.nbd.to_string()]);
    command.arg("--backing").arg(settings.backing).arg("--meta").arg(settings.meta);
    command.arg("--above").arg(settings.above.unwrap_or(Path::new("")));
    command.args(["--via", settings.via.unwrap_or_default(), "--capacity", &settings.capacity.to_string()]);
    command.args(["--journal-size", &settings.journal_size.to_string()]);
    let status = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).status()?;
    if status.success() { Ok(()) } else { Err(std::io::Error::other(format!("setsid: {status}"))) }
}

/// Waits until the service answers.
async fn answering(name: &str) -> Result<Status, ApiError> {
    let mut backoff =
        Backoff::new(Duration::from_millis(20), Duration::from_millis(500), START).map_err(|e| failed(&e))?;
    loop {
        match client(name).status().await {
            Ok(status) => return Ok(status),
            Err(error) if backoff.wait().await.is_err() => return Err(client_error(&error)),
            Err(_) => {}
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf, ApiError> {
    std::path::absolute(path).map_err(|error| failed(&format!("{}: {error}", path.display())))
}

/// As the service has it: a name is part of paths and of a unit's name.
fn check_name(name: &str) -> Result<(), ApiError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        let text = format!(
            "a disk's name has 1 to 64 letters, digits, '-', '_' and '.', and does not begin with a dot: {name:?}"
        );
        return Err(ApiError::new(ErrorCode::Invalid, text));
    }
    Ok(())
}

/// One disk in one line.
#[must_use]
pub fn line(status: &Status) -> String {
    let Status { name, role, .. } = status;
    let size = status.size >> 20;
    let head = format!("{name:<16} {role:<7} {size:>8} MiB");
    let nbd = status.nbd.map_or(String::new(), |n| format!(" as /dev/nbd{n}"));
    match (role.as_str(), &status.target) {
        ("source", _) => {
            let use_ = if status.open { format!("open{nbd}") } else { "closed".into() };
            let copy = match (status.connected, status.in_sync, &status.via) {
                (true, true, _) => "its copy is alike".into(),
                (true, false, _) => format!("synchronising, {} MiB to go", status.sync_left >> 20),
                (false, _, Some(_)) => format!("NO COPY reached, {} MiB marked", status.marked >> 20),
                (false, _, None) => format!("nobody looks for a copy, {} MiB marked", status.marked >> 20),
            };
            format!("{head}  {use_}, {copy}  {}", status.link.display())
        }
        ("target", Some(target)) if target.connected => {
            let armed = if target.armed { ", held epoch by epoch" } else { "" };
            let synced = if target.synced { "follows" } else { "being synchronised" };
            format!("{head}  {synced}{armed}, {} KiB held", target.held >> 10)
        }
        ("target", _) => {
            format!("{head}  nobody to follow, {}", if status.good { "good" } else { "NOT known to be good" })
        }
        _ => format!("{head}  not used yet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_file_keeps_every_character() {
        let (backing, meta) = (Path::new("/dev/vg/a b"), Path::new("/m"));
        let settings =
            Settings { backing, above: None, meta, nbd: 3, via: Some(r#"x "$1" \`y"#), capacity: 9, journal_size: 7 };
        let text = environment(&settings);
        assert_eq!(
            text,
            "BACKING=\"/dev/vg/a b\"\nABOVE=\"\"\nMETA=\"/m\"\nNBD=3\nVIA=\"x \\\"\\$1\\\" \\\\\\`y\"\nCAPACITY=9\nJOURNAL_SIZE=7\n"
        );
        assert_eq!(value_of(&text, "VIA").as_deref(), settings.via);
        assert_eq!(value_of(&text, "META").as_deref(), Some("/m"));
        assert_eq!(value_of(&text, "NOTHING"), None);
    }

    #[test]
    fn names_that_are_no_names_are_refused() {
        for name in ["", ".hidden", "a/b", "a b", "@", &"x".repeat(65)] {
            assert_eq!(check_name(name).unwrap_err().code, ErrorCode::Invalid, "{name}");
        }
        assert!(check_name("web-1_root.img").is_ok());
    }

    #[test]
    fn a_line_says_what_is_wrong() {
        let mut status = Status { name: "d".into(), role: "source".into(), open: true, ..Status::default() };
        assert!(line(&status).contains("nobody looks for a copy"));
        status.via = Some("x".into());
        assert!(line(&status).contains("NO COPY"));
        (status.connected, status.in_sync) = (true, true);
        assert!(line(&status).contains("alike"));
        status.role = "target".into();
        assert!(line(&status).contains("NOT known to be good"));
    }
}
