//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::disk::{Disk, DiskCommand};
use super::enable::{Disable, Enable};
use super::pair::{Keys, Pair};
use super::protect::Protect;
use super::trace::TraceArgs;
use crate::api::Request;
use crate::api::types::default_socket;
use crate::ops::{EventKind, OperationId};

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
    /// Protect a domain whenever it runs on this host, from now on and after a reboot: writes its policy.
    Enable(Box<Enable>),
    /// Take a domain's policy away: it is not protected by itself any more.
    Disable(Disable),
    /// Have the daemon read its configuration and the policies anew.
    Reload,
    /// Show every protection of this host, in both roles: one line each.
    Status {
        /// Only this domain.
        domain: Option<String>,
    },
    /// Write the newest epochs of a protection from this host as a trace: JSON for chrome://tracing or Perfetto.
    Trace(TraceArgs),
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
        #[arg(long, alias = "async")]
        no_wait: bool,
        /// Wait for its end for so many seconds at most; it goes on ending.
        #[arg(long, value_name = "S", conflicts_with = "no_wait", value_parser = clap::value_parser!(u64).range(1..))]
        timeout: Option<u64>,
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
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// On the backup: prove that the copy would start, by starting it in isolation. The guest and its protection go on untouched.
    Drill {
        /// Domain name or UUID.
        domain: String,
        /// How long it is to run, in milliseconds.
        #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1000..=600_000))]
        run_ms: u64,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// On the backup: destroy the copy without starting it.
    Discard {
        /// Domain name or UUID.
        domain: String,
        /// How to hear of the end.
        #[command(flatten)]
        notify: Notify,
    },
    /// Mirrored disks of this host: set up, attach, detach, show.
    Disk(Disk),
    /// Show every protection live, with what its epochs cost.
    Top {
        /// Only this domain.
        domain: Option<String>,
    },
    /// Check every prerequisite of a protection, on this host and on the one that is to be the backup, and say what to do.
    Doctor(Doctor),
    /// Print the completions of a shell, to be sourced by it.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages of all commands.
    #[command(hide = true)]
    Man {
        /// Folder to write them to.
        folder: PathBuf,
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

/// Options of `remus doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// The other host, which is asked over ssh.
    pub host: Option<String>,
    /// The guest that is to be protected: what concerns it counts for the exit code.
    #[arg(short, long)]
    pub guest: Option<String>,
    /// Command used instead of ssh.
    #[arg(short = 's', long)]
    pub ssh: Option<String>,
}

/// How to hear of the end.
#[derive(Debug, clap::Args)]
pub struct Notify {
    /// Do not wait: print the job's number; its end is an `operation_complete` event with this tag.
    #[arg(long)]
    pub tag: Option<String>,
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
            Command::AssumeAlone { domain, notify, .. } => {
                Request::AssumeAlone { domain: domain.clone(), tag: notify.tag.clone() }
            }
            // These go to the pairing socket, or nowhere, or take more than one answer.
            Command::Pair(_)
            | Command::Unpair { .. }
            | Command::Enable(_)
            | Command::Disable(_)
            | Command::Peers
            | Command::Keys { .. }
            | Command::Top { .. }
            | Command::Doctor(_)
            | Command::Completions { .. }
            | Command::Man { .. } => {
                return Err("not a request of the control API".into());
            }
            Command::Status { domain } => Request::Status { domain: domain.clone() },
            Command::Trace(trace) => Request::Trace { domain: trace.domain.clone(), epochs: Some(trace.epochs) },
            Command::Events { follow, domain, kinds, after } => {
                let (domain, after) = (domain.clone(), *after);
                let kinds = (!kinds.is_empty()).then(|| kinds.clone());
                if *follow {
                    Request::FollowEvents { domain, kinds, after }
                } else {
                    Request::GetEvents { domain, kinds, after }
                }
            }
            Command::Reload => Request::Reload { domain: None },
            Command::Jobs => Request::Jobs {},
            Command::Abort { job, no_wait, .. } => Request::Abort { job: OperationId(*job), wait: !no_wait },
            Command::Failover { domain, primary_is_off, notify } => {
                Request::Failover { domain: domain.clone(), primary_is_off: *primary_is_off, tag: notify.tag.clone() }
            }
            Command::Drill { domain, run_ms, notify } => {
                Request::Drill { domain: domain.clone(), run_ms: Some(*run_ms), tag: notify.tag.clone() }
            }
            Command::Discard { domain, notify } => Request::Discard { domain: domain.clone(), tag: notify.tag.clone() },
            Command::Recover { domain, assume_owner, notify } => {
                Request::Recover { domain: domain.clone(), assume_owner: *assume_owner, tag: notify.tag.clone() }
            }
            Command::Gate(_) => return Err("the gate needs no daemon".into()),
            Command::Disk(Disk { command: DiskCommand::Verify { name, notify } }) => {
                Request::VerifyDisk { disk: name.clone(), tag: notify.tag.clone() }
            }
            Command::Disk(_) => return Err("disks need no daemon".into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::transport::DEFAULT_SSH;
    use crate::protect::options::Target;

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
    fn the_command_line_is_sound_and_shells_can_complete_it() {
        use clap::CommandFactory;
        Args::command().debug_assert();
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Args::command(), "remus", &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("assume-alone") && script.contains("--primary-is-off"));
    }

    #[test]
    fn events_can_be_filtered_and_jobs_aborted() {
        let typed = request("remus events -f -d web -k job-failed --kind unprotected --after 7").unwrap();
        let kinds = Some(vec![EventKind::JobFailed, EventKind::Unprotected]);
        assert_eq!(typed, Request::FollowEvents { domain: Some("web".into()), kinds, after: Some(7) });
        assert_eq!(request("remus abort 3").unwrap(), Request::Abort { job: OperationId(3), wait: true });
        assert_eq!(request("remus abort 3 --no-wait").unwrap(), Request::Abort { job: OperationId(3), wait: false });
        assert_eq!(request("remus abort 3 --async").unwrap(), Request::Abort { job: OperationId(3), wait: false });
        assert_eq!(request("remus abort 3 --timeout 5").unwrap(), Request::Abort { job: OperationId(3), wait: true });
        assert!(request("remus abort 3 --timeout 5 --async").is_err() && request("remus abort 3 --force").is_err());
        let compared = request("remus disk verify d0 --tag t").unwrap();
        assert_eq!(compared, Request::VerifyDisk { disk: "d0".into(), tag: Some("t".into()) });
        let tagged = request("remus unprotect web --tag mine").unwrap();
        assert_eq!(tagged, Request::Unprotect { domain: "web".into(), tag: Some("mine".into()) });
        assert!(request("remus protect g b --foreground --tag x").is_err());
    }

    #[test]
    fn a_disk_is_given_to_a_program_once_and_in_these_words() {
        let Request::Protect { options: Some(options), .. } =
            request("remus protect g b --disk xvda=script:/a --disk xvdb=script:/b").unwrap()
        else {
            panic!("not a protection")
        };
        let scripts: Vec<_> = options.disk_scripts.iter().map(|(d, p)| (d.as_str(), p.to_str().unwrap())).collect();
        assert_eq!(scripts, [("xvda", "/a"), ("xvdb", "/b")]);
        for wrong in ["xvda", "xvda=/a", "=script:/a", "xvda=script:", "xvda=script:/a --disk xvda=script:/b"] {
            assert!(request(&format!("remus protect g b --disk {wrong}")).unwrap_err().contains("--disk"), "{wrong}");
        }
    }

    #[test]
    fn ranges_are_checked() {
        assert!(request("remus protect g b -i 0").unwrap_err().contains("interval-ms"));
        assert!(request("remus protect g b -i auto:9-5").unwrap_err().contains("max-interval-ms is 5"));
    }

    #[test]
    fn an_interval_is_a_number_or_automatic() {
        let interval = |typed: &str| match request(&format!("remus protect g b --interval {typed}")) {
            Ok(Request::Protect { options: Some(options), .. }) => {
                Ok((options.interval_ms, options.auto_interval.map(|auto| (auto.min_gap_ms, auto.max_interval_ms))))
            }
            other => Err(format!("{other:?}")),
        };
        assert_eq!(interval("50"), Ok((50, None)));
        assert_eq!(interval("auto"), Ok((200, Some((5, 500)))));
        assert_eq!(interval("auto:20-1000"), Ok((200, Some((20, 1000)))));
        for wrong in ["automatic", "auto:", "auto:5", "auto:-5", "5-500", "auto:a-b", "fast"] {
            assert!(interval(wrong).unwrap_err().contains("auto:MIN-MAX"), "{wrong}");
        }
    }
}
