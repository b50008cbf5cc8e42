//! What can be typed after `remusd`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// High availability for Xen guests by continuous checkpoint replication.
#[derive(Debug, Parser)]
#[command(name = "remusd", version)]
pub struct Args {
    /// What to do; nothing is to be the daemon.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// As the daemon.
    #[command(flatten)]
    pub run: Run,
}

/// Options of the daemon.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// Where the durable state is.
    #[arg(long, default_value = "/var/lib/remus")]
    pub state_dir: PathBuf,
    /// Control socket.
    #[arg(long, default_value = "/run/remus/remusd.sock")]
    pub socket: PathBuf,
    /// Socket at which other hosts' daemons arrive (through `remusd connect`).
    #[arg(long, default_value = crate::link::bridge::LINK_SOCKET)]
    pub link_socket: PathBuf,
    /// xl-save-helper to use [default: that of the running Xen; $LIBXL_SAVE_HELPER].
    #[arg(long)]
    pub save_helper: Option<PathBuf>,
    /// xl to receive with.
    #[arg(long, default_value = "xl")]
    pub xl: PathBuf,
    /// Configuration file; need not exist.
    #[arg(long, default_value = crate::config::PATH)]
    pub config: PathBuf,
    /// Folder of the domains' policies; need not exist.
    #[arg(long, default_value = crate::policy::FOLDER)]
    pub policies: PathBuf,
    /// For finding faults: keep all capabilities of root, for this process and its children.
    #[arg(long)]
    pub keep_capabilities: bool,
}

/// The programs that are not the daemon.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Carry a link: copies between standard input/output and the daemon's link socket. Run by the peer over ssh.
    Connect {
        /// The daemon's link socket.
        #[arg(long, default_value = crate::link::bridge::LINK_SOCKET)]
        link_socket: PathBuf,
    },
    /// Pair this host with the one whose `remus pair` runs this over ssh.
    Pair {
        /// The daemon's control socket.
        #[arg(long, default_value = "/run/remus/remusd.sock")]
        socket: PathBuf,
    },
    /// UNSAFE: stand where `xl remus -s` expects `xl migrate-receive -r`: the copy waits here for an operator.
    ReceiveStock {
        /// The daemon's link socket.
        #[arg(long, default_value = crate::link::bridge::LINK_SOCKET)]
        link_socket: PathBuf,
    },
    /// Say what the daemon would make of its configuration and policies, and what is wrong with them. Needs no daemon.
    CheckConfig {
        /// Configuration file.
        #[arg(long, default_value = crate::config::PATH)]
        config: PathBuf,
        /// Folder of the domains' policies.
        #[arg(long, default_value = crate::policy::FOLDER)]
        policies: PathBuf,
    },
    /// Say whether a domain's writes are being logged: `on` or `off`. For when nothing saves it: asking ends the logging.
    #[command(hide = true)]
    LogDirty {
        /// Domain name, id or UUID.
        domain: String,
    },
    /// Read pages of a domain as the audit does, through fresh mappings: one line per page with its hash, or `-` for a page that the
    /// audit leaves out; then what it cost.
    #[command(hide = true)]
    AuditRead {
        /// Domain name, id or UUID.
        domain: String,
        /// Page numbers; all at once are at most 1024.
        #[arg(required = true)]
        gfns: Vec<u64>,
    },
    /// Boot a domain from libxl's JSON on standard input; prints its id. Run by the daemon when a guest reboots.
    #[command(hide = true)]
    CreateDomain,
}
