//! Options of `remus protect`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::args::Notify;
use crate::api::{Request, TargetSpec};
use crate::link::transport::DEFAULT_SSH;
use crate::protect::machine::OnBackupLoss;
use crate::protect::options::{AutoInterval, EngineKind, OnPrimaryLoss, ProtectOptions, Target, Then};

/// What to do with output when the backup is lost.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackupLoss {
    /// The guest goes on alone, held output flows.
    Alone,
    /// Output stays held until an operator decides.
    Hold,
}

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// In milliseconds.
    Fixed(u64),
    /// By need.
    Auto(AutoInterval),
}

impl std::fmt::Display for Interval {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(ms) => ms.fmt(f),
            Self::Auto(auto) => write!(f, "auto:{}-{}", auto.min_gap_ms, auto.max_interval_ms),
        }
    }
}

impl std::str::FromStr for Interval {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let wrong = || "give milliseconds, auto, or auto:MIN-MAX in milliseconds".to_owned();
        let ms = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        match typed.strip_prefix("auto") {
            None => Ok(Self::Fixed(ms(typed)?)),
            Some("") => Ok(Self::Auto(AutoInterval::default())),
            Some(range) => {
                let (min, max) = range.strip_prefix(':').and_then(|range| range.split_once('-')).ok_or_else(wrong)?;
                Ok(Self::Auto(AutoInterval { min_gap_ms: ms(min)?, max_interval_ms: ms(max)? }))
            }
        }
    }
}

/// What captures the guest.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CaptureEngine {
    /// Xen's own libxl-save-helper.
    SaveHelper,
    /// remusd itself: shorter pauses; PVH and HVM guests.
    Native,
}

/// What the backup does when the primary is lost.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrimaryLoss {
    /// Wait for `remus failover`.
    Wait,
    /// Activate at once: two live copies are possible.
    Activate,
}

/// How the link is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TransportChoice {
    /// By ssh to the other host's daemon.
    Ssh,
    /// By TLS between paired hosts.
    Tls,
}

/// Options of `remus protect`.
#[derive(Debug, clap::Args)]
pub struct Protect {
    /// Domain name, id or UUID.
    pub domain: String,
    /// Host to keep the copy; with an empty --ssh, the shell command that carries the link.
    pub host: String,
    /// How to protect it.
    #[command(flatten)]
    pub choices: Choices,
    /// Stay until protection ends; Ctrl-C ends it.
    #[arg(long, conflicts_with = "tag")]
    pub foreground: bool,
    /// How to hear of the end.
    #[command(flatten)]
    pub notify: Notify,
}

/// How a domain is to be protected.
#[derive(Debug, clap::Args)]
pub struct Choices {
    /// Checkpoint interval in ms, from one release to the next suspend; or auto (the same as auto:5-500): a checkpoint as soon as
    /// output waits or much was written, after MIN ms at the earliest and MAX ms at the latest, and the guest runs at least half of the
    /// time.
    #[arg(short, long, value_name = "MS|auto[:MIN-MAX]", default_value_t = Interval::Fixed(ProtectOptions::default().interval_ms))]
    pub interval: Interval,
    /// Command used instead of ssh; an empty one makes HOST itself the command.
    #[arg(short = 's', long)]
    pub ssh: Option<String>,
    /// How to reach HOST [default: tls if it is paired (`remus peers`) and no --ssh is given, else ssh].
    #[arg(long, value_enum)]
    pub transport: Option<TransportChoice>,
    /// Silence in ms after which the other side counts as lost.
    #[arg(long, default_value_t = ProtectOptions::default().detection_ms)]
    pub detection_ms: u64,
    /// Time in ms within which the backup has to acknowledge an epoch.
    #[arg(long, default_value_t = ProtectOptions::default().ack_deadline_ms)]
    pub ack_deadline_ms: u64,
    /// Time in ms within which the guest has to suspend.
    #[arg(long, default_value_t = ProtectOptions::default().suspend_deadline_ms)]
    pub suspend_deadline_ms: u64,
    /// Time in ms after which a suspended guest is resumed whatever happens.
    #[arg(long, default_value_t = ProtectOptions::default().pause_deadline_ms)]
    pub pause_deadline_ms: u64,
    /// Bytes of one epoch held in dom0 at most.
    #[arg(long, default_value_t = ProtectOptions::default().epoch_budget)]
    pub epoch_budget: u64,
    /// Bytes of output held per vif at most.
    #[arg(long, default_value_t = ProtectOptions::default().netbuffer_limit)]
    pub netbuffer_limit: u32,
    /// Script that makes the intermediate device of each vif in our place: `SCRIPT setup|teardown` with vifname and XENBUS_PATH in
    /// its environment, as for `xl remus -N`. A name without a slash is looked for in PATH.
    #[arg(long, value_name = "SCRIPT")]
    pub netbuffer_script: Option<PathBuf>,
    /// The backup's xl does not stay behind as the monitor of the guest it has activated: as `xl remus -e`.
    #[arg(long)]
    pub no_monitor: bool,
    /// What captures the guest.
    #[arg(long, value_enum, default_value = "save-helper")]
    pub engine: CaptureEngine,
    /// When the backup is lost.
    #[arg(long, value_enum, default_value = "alone")]
    pub on_backup_loss: BackupLoss,
    /// When the primary is lost.
    #[arg(long, value_enum, default_value = "wait")]
    pub on_primary_loss: PrimaryLoss,
    /// UNSAFE choices, by name: disk:VDEV or disk:all (its contents are not replicated), no-netbuffer (output is not
    /// held), drbd (disks on DRBD with protocol D, which can be an epoch ahead after a loss), stock-receiver (HOST is a command that runs `xl migrate-receive -r`), blackhole (no copy at all).
    #[arg(long = "unsafe", value_name = "WHAT")]
    pub unsafe_choices: Vec<String>,
    /// A disk that a program keeps in step, on both hosts: its name in the guest, and the program (docs/disks.md). May be given for
    /// several disks. A name without a slash is looked for in PATH.
    #[arg(long = "disk", value_name = "VDEV=script:PROGRAM")]
    pub disks: Vec<String>,
    /// Who decides when one host is lost: http(s)://HOST:PORT of an etcd (several with commas), script:/PATH, or `configured` for the
    /// one in /etc/remus/witness.json. It must be on neither host. Without one only an operator can activate the backup.
    #[arg(long, value_name = "WITNESS")]
    pub witness: Option<String>,
    /// After a failover or switchover the new primary protects the guest back to this host, once it answers.
    #[arg(long, conflicts_with = "then")]
    pub reprotect: bool,
    /// As --reprotect, but to this host.
    #[arg(long, value_name = "HOST")]
    pub then: Option<String>,
    /// If xendomains boots the domain at this host's start: do that in its place, once it is proven that it may run here.
    #[arg(long)]
    pub manage_autostart: bool,
}

/// Where the daemon, which has another working directory, finds a program. As with `execvp`, PATH counts for a name without a slash.
fn program(typed: &Path) -> Result<PathBuf, String> {
    if typed.parent() != Some(Path::new("")) {
        return std::path::absolute(typed).map_err(|e| format!("{}: {e}", typed.display()));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join(typed)).find(|p| p.is_file());
    found.ok_or_else(|| format!("{} is not in PATH", typed.display()))
}

impl Protect {
    /// The request that was typed.
    ///
    /// # Errors
    /// A sentence about a value that makes no sense.
    pub fn request(&self) -> Result<Request, String> {
        let (target, options) = self.choices.towards(&self.host)?;
        Ok(Request::Protect {
            domain: self.domain.clone(),
            target: TargetSpec::from(target),
            options: Some(Box::new(options)),
            foreground: self.foreground,
            tag: self.notify.tag.clone(),
        })
    }
}

impl Choices {
    fn disk_scripts(&self) -> Result<BTreeMap<String, PathBuf>, String> {
        let mut scripts = BTreeMap::new();
        for typed in &self.disks {
            let parts = typed.split_once('=').and_then(|(vdev, how)| Some((vdev, how.strip_prefix("script:")?)));
            let Some((vdev, path)) = parts.filter(|(vdev, path)| !vdev.is_empty() && !path.is_empty()) else {
                return Err(format!(
                    "--disk {typed}: write VDEV=script:PROGRAM, such as xvdb=script:/usr/lib/remus/disk-by-copy"
                ));
            };
            if scripts.insert(vdev.to_owned(), program(Path::new(path))?).is_some() {
                return Err(format!("--disk {typed}: {vdev} is given twice"));
            }
        }
        Ok(scripts)
    }

    /// Where to and how, with this host as it was typed.
    ///
    /// # Errors
    /// A sentence about a value that makes no sense.
    pub fn towards(&self, host: &str) -> Result<(Target, ProtectOptions), String> {
        let mut options = ProtectOptions {
            interval_ms: match self.interval {
                Interval::Fixed(ms) => ms,
                Interval::Auto(_) => ProtectOptions::default().interval_ms,
            },
            auto_interval: match self.interval {
                Interval::Fixed(_) => None,
                Interval::Auto(auto) => Some(auto),
            },
            detection_ms: self.detection_ms,
            ack_deadline_ms: self.ack_deadline_ms,
            suspend_deadline_ms: self.suspend_deadline_ms,
            pause_deadline_ms: self.pause_deadline_ms,
            epoch_budget: self.epoch_budget,
            netbuffer_limit: self.netbuffer_limit,
            no_monitor: self.no_monitor,
            manage_autostart: self.manage_autostart,
            netbuffer_script: self.netbuffer_script.as_deref().map(program).transpose()?,
            disk_scripts: self.disk_scripts()?,
            witness: self.witness.clone(),
            then: match &self.then {
                Some(host) => Then::To(host.clone()),
                None if self.reprotect => Then::Back,
                None => Then::Nothing,
            },
            engine: match self.engine {
                CaptureEngine::SaveHelper => EngineKind::SaveHelper,
                CaptureEngine::Native => EngineKind::Native,
            },
            on_backup_loss: match self.on_backup_loss {
                BackupLoss::Alone => OnBackupLoss::Alone,
                BackupLoss::Hold => OnBackupLoss::Hold,
            },
            on_primary_loss: match self.on_primary_loss {
                PrimaryLoss::Wait => OnPrimaryLoss::Wait,
                PrimaryLoss::Activate => OnPrimaryLoss::Activate,
            },
            ..ProtectOptions::default()
        };
        let host = host.to_owned();
        let mut target = match (self.transport, &self.ssh) {
            (Some(TransportChoice::Tls), Some(_)) => return Err("--transport tls and --ssh exclude each other".into()),
            (Some(TransportChoice::Tls), None) => Target::Tls { host: host.clone(), id: None },
            (_, Some(ssh)) if ssh.is_empty() => Target::Command(host.clone()),
            (Some(TransportChoice::Ssh), None) => Target::Host { host: host.clone(), ssh: Some(DEFAULT_SSH.into()) },
            (_, ssh) => Target::Host { host: host.clone(), ssh: ssh.clone() },
        };
        for choice in &self.unsafe_choices {
            match choice.as_str() {
                "no-netbuffer" => options.no_netbuffer = true,
                "drbd" => options.drbd = true,
                "blackhole" => target = Target::Blackhole,
                "stock-receiver" => {
                    let command = match &self.ssh {
                        Some(ssh) if ssh.is_empty() => host.clone(),
                        Some(ssh) => format!("exec {ssh} {host} xl migrate-receive -r"),
                        None => format!("exec ssh {host} xl migrate-receive -r"),
                    };
                    target = Target::StockReceiver(command);
                }
                other => match other.strip_prefix("disk:") {
                    Some(disk) if !disk.is_empty() => options.unsafe_disks.push(disk.into()),
                    _ => {
                        return Err(format!(
                            "--unsafe {other}: choose disk:VDEV, disk:all, no-netbuffer, drbd, stock-receiver or blackhole"
                        ));
                    }
                },
            }
        }
        options.validate().map_err(|e| e.to_string())?;
        Ok((target, options))
    }
}
