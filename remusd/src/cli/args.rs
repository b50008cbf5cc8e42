//! What can be typed.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand, ValueEnum};

use super::pair::{Keys, Pair};
use crate::api::types::default_socket;
use crate::api::{Request, TargetSpec};
use crate::link::transport::DEFAULT_SSH;
use crate::ops::{EventKind, OperationId};
use crate::protect::machine::OnBackupLoss;
use crate::protect::options::{OnPrimaryLoss, ProtectOptions, Target, Then};

/// Keeps Xen guests running through the loss of their host.
#[derive(Debug, Parser)]
#[command(name = "remus", version, after_help = EXIT_CODES)]
pub struct Args {
    /// Answer in JSON, one object a line, for programs.
    #[arg(long, global = true)]
    pub json: bool,
    /// Control socket of the daemon [default: $REMUS_SOCKET or /run/remus/remusd.sock].
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 not permitted; 4 no such domain or protection; \
5 in conflict with what is there; 6 something needed is missing here; 7 the peer refused or cannot be reached; \
8 protection ended and the guest is unprotected (protect --foreground); 9 aborted.";

/// What to do with output when the backup is lost.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackupLoss {
    /// The guest goes on alone, held output flows.
    Alone,
    /// Output stays held until an operator decides.
    Hold,
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

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect a running domain: checkpoint it to another host until told otherwise.
    Protect(Box<Protect>),
    /// End a protection: the guest runs on here, no copy is left on the backup.
    Unprotect {
        /// Domain name, id or UUID.
        domain: String,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Show every protection of this host, in both roles: one line each.
    Status {
        /// Only this domain.
        domain: Option<String>,
    },
    /// Show what happened.
    Events {
        /// Go on showing.
        #[arg(short, long)]
        follow: bool,
        /// Only this domain: name, id or UUID.
        #[arg(short, long)]
        domain: Option<String>,
        /// Only this kind; may be given more than once.
        #[arg(short, long = "kind", value_name = "KIND")]
        kinds: Vec<EventKind>,
        /// Only those with a greater number.
        #[arg(long, value_name = "SEQ")]
        after: Option<u64>,
    },
    /// Show the operations under way and the latest that have ended.
    Jobs,
    /// Ask a job to give up, where that is safe.
    Abort {
        /// Its number, as `remus jobs` shows it.
        job: u64,
        /// Do not wait for its end.
        #[arg(long)]
        no_wait: bool,
    },
    /// On the backup: start the copy, because the primary host is gone.
    Failover {
        /// Domain name or UUID.
        domain: String,
        /// I have made sure that the primary host is off. If it is not, two copies may run.
        #[arg(long)]
        primary_is_off: bool,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// On the primary: move the guest to the backup. Nothing is lost; how long it stood still is printed.
    Switchover {
        /// Domain name, id or UUID.
        domain: String,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Let this host's copy go on although nobody says that it may: the other host and the witness are both silent.
    AssumeAlone {
        /// Domain name, id or UUID.
        domain: String,
        /// I know the risk: do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// On the backup: destroy the copy without starting it.
    Discard {
        /// Domain name or UUID.
        domain: String,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Pair this host with another: from then on their daemons speak TLS, without ssh.
    Pair(Box<Pair>),
    /// Forget a paired host: its open sessions end, and it gets no new ones.
    Unpair {
        /// Its name.
        host: String,
    },
    /// Show whom this host is paired with.
    Peers,
    /// This host's keys.
    Keys {
        /// What to do.
        #[command(subcommand)]
        keys: Keys,
    },
    /// Put right what a crashed protection has left behind: resume the guest, log-dirty off, qdiscs away.
    Recover {
        /// Domain name, id or UUID; all that have a record when left out.
        domain: Option<String>,
        /// I have made sure that no other copy runs: do not ask the peer.
        #[arg(long)]
        assume_owner: bool,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Keep copies that lost off the network: the hotplug script that seals guarded domains. Needs no daemon.
    Gate(crate::gate::command::GateArgs),
}

/// How to hear of the end.
#[derive(Debug, clap::Args)]
pub struct Notify {
    /// Do not wait: print the job's number; its end is an `operation_complete` event with this tag.
    #[arg(long)]
    pub tag: Option<String>,
}

/// Options of `remus protect`.
#[derive(Debug, clap::Args)]
pub struct Protect {
    /// Domain name, id or UUID.
    pub domain: String,
    /// Host to keep the copy; with an empty --ssh, the shell command that carries the link.
    pub host: String,
    /// Checkpoint interval in ms, from one release to the next suspend.
    #[arg(short, long, default_value_t = ProtectOptions::default().interval_ms)]
    pub interval: u64,
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
    /// When the backup is lost.
    #[arg(long, value_enum, default_value = "alone")]
    pub on_backup_loss: BackupLoss,
    /// When the primary is lost.
    #[arg(long, value_enum, default_value = "wait")]
    pub on_primary_loss: PrimaryLoss,
    /// UNSAFE choices, by name: disk:VDEV or disk:all (its contents are not replicated), no-netbuffer (output is not
    /// held), stock-receiver (HOST is a command that runs `xl migrate-receive -r`), blackhole (no copy at all).
    #[arg(long = "unsafe", value_name = "WHAT")]
    pub unsafe_choices: Vec<String>,
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
    /// Stay until protection ends; Ctrl-C ends it.
    #[arg(long, conflicts_with = "tag")]
    pub foreground: bool,
    /// How to hear of the end.
    #[command(flatten)]
    pub notify: Notify,
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
    fn request(&self) -> Result<Request, String> {
        let mut options = ProtectOptions {
            interval_ms: self.interval,
            detection_ms: self.detection_ms,
            ack_deadline_ms: self.ack_deadline_ms,
            suspend_deadline_ms: self.suspend_deadline_ms,
            pause_deadline_ms: self.pause_deadline_ms,
            epoch_budget: self.epoch_budget,
            netbuffer_limit: self.netbuffer_limit,
            no_monitor: self.no_monitor,
            netbuffer_script: self.netbuffer_script.as_deref().map(program).transpose()?,
            witness: self.witness.clone(),
            then: match &self.then {
                Some(host) => Then::To(host.clone()),
                None if self.reprotect => Then::Back,
                None => Then::Nothing,
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
        let host = self.host.clone();
        let mut target = match (self.transport, &self.ssh) {
            (Some(TransportChoice::Tls), Some(_)) => return Err("--transport tls and --ssh exclude each other".into()),
            (Some(TransportChoice::Tls), None) => Target::Tls { host, id: None },
            (_, Some(ssh)) if ssh.is_empty() => Target::Command(host),
            (Some(TransportChoice::Ssh), None) => Target::Host { host, ssh: Some(DEFAULT_SSH.into()) },
            (_, ssh) => Target::Host { host, ssh: ssh.clone() },
        };
        for choice in &self.unsafe_choices {
            match choice.as_str() {
                "no-netbuffer" => options.no_netbuffer = true,
                "blackhole" => target = Target::Blackhole,
                "stock-receiver" => {
                    let command = match &self.ssh {
                        Some(ssh) if ssh.is_empty() => self.host.clone(),
                        Some(ssh) => format!("exec {ssh} {} xl migrate-receive -r", self.host),
                        None => format!("exec ssh {} xl migrate-receive -r", self.host),
                    };
                    target = Target::StockReceiver(command);
                }
                other => match other.strip_prefix("disk:") {
                    Some(disk) if !disk.is_empty() => options.unsafe_disks.push(disk.into()),
                    _ => {
                        return Err(format!(
                            "--unsafe {other}: choose disk:VDEV, disk:all, no-netbuffer, stock-receiver or blackhole"
                        ));
                    }
                },
            }
        }
        options.validate().map_err(|e| e.to_string())?;
        Ok(Request::Protect {
            domain: self.domain.clone(),
            target: TargetSpec::from(target),
            options: Some(Box::new(options)),
            foreground: self.foreground,
            tag: self.notify.tag.clone(),
        })
    }
}

impl Args {
    /// Where the daemon is.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(default_socket)
    }

    /// The request that was typed.
    ///
    /// # Errors
    /// A sentence about a value that makes no sense.
    pub fn request(&self) -> Result<Request, String> {
        Ok(match &self.command {
            Command::Protect(protect) => protect.request()?,
            Command::Unprotect { domain, notify } => {
                Request::Unprotect { domain: domain.clone(), tag: notify.tag.clone() }
            }
            Command::Switchover { domain, notify } => {
                Request::Switchover { domain: domain.clone(), tag: notify.tag.clone() }
            }
            Command::AssumeAlone { domain, .. } => Request::AssumeAlone { domain: domain.clone() },
            // These go to the pairing socket.
            Command::Pair(_) | Command::Unpair { .. } | Command::Peers | Command::Keys { .. } => {
                return Err("not a request of the control API".into());
            }
            Command::Status { domain } => Request::Status { domain: domain.clone() },
            Command::Events { follow, domain, kinds, after } => {
                let (domain, after) = (domain.clone(), *after);
                let kinds = (!kinds.is_empty()).then(|| kinds.clone());
                if *follow {
                    Request::FollowEvents { domain, kinds, after }
                } else {
                    Request::GetEvents { domain, kinds, after }
                }
            }
            Command::Jobs => Request::Jobs {},
            Command::Abort { job, no_wait } => Request::Abort { job: OperationId(*job), wait: !no_wait },
            Command::Failover { domain, primary_is_off, notify } => {
                Request::Failover { domain: domain.clone(), primary_is_off: *primary_is_off, tag: notify.tag.clone() }
            }
            Command::Discard { domain, notify } => Request::Discard { domain: domain.clone(), tag: notify.tag.clone() },
            Command::Recover { domain, assume_owner, notify } => {
                Request::Recover { domain: domain.clone(), assume_owner: *assume_owner, tag: notify.tag.clone() }
            }
            Command::Gate(_) => return Err("the gate needs no daemon".into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(line: &str) -> Result<Request, String> {
        Args::try_parse_from(line.split(' ')).map_err(|e| e.to_string())?.request()
    }

    #[test]
    fn unsafe_things_must_be_named() {
        let Request::Protect { options, target, .. } =
            request("remus protect g b --unsafe disk:xvda --unsafe no-netbuffer").unwrap()
        else {
            panic!()
        };
        let options = options.unwrap();
        assert_eq!(options.unsafe_disks, ["xvda"]);
        assert!(options.no_netbuffer);
        assert_eq!(target.try_into(), Ok(Target::Host { host: "b".into(), ssh: None }));
        assert!(request("remus protect g b --unsafe everything").unwrap_err().contains("choose"));
    }

    #[test]
    fn an_empty_ssh_makes_the_host_a_command() {
        let args = Args::try_parse_from(["remus", "protect", "g", "nc b 7", "-s", ""]).unwrap();
        let Request::Protect { target, .. } = args.request().unwrap() else { panic!() };
        assert_eq!(target.try_into(), Ok(Target::Command("nc b 7".into())));
    }

    #[test]
    fn the_transport_can_be_chosen() {
        let target = |line: &str| match request(line).unwrap() {
            Request::Protect { target, .. } => Target::try_from(target).unwrap(),
            other => panic!("{other:?}"),
        };
        assert_eq!(target("remus protect g b --transport tls"), Target::Tls { host: "b".into(), id: None });
        assert_eq!(
            target("remus protect g b --transport ssh"),
            Target::Host { host: "b".into(), ssh: Some(DEFAULT_SSH.into()) }
        );
        assert!(request("remus protect g b --transport tls -s rsh").unwrap_err().contains("exclude"));
    }

    #[test]
    fn ranges_are_checked() {
        assert!(request("remus protect g b -i 0").unwrap_err().contains("interval-ms"));
    }
}
