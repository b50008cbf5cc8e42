//! `remus-disk`: the service of one mirrored disk, and what talks to it. `docs/disks.md` describes it.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use devices::mirror::service::{JournalConfig, Node, NodeConfig, Request, Response, bridge, call, serve_control};
use nix::sys::mman::{MlockAllFlags, mlockall};

/// The service of one mirrored disk.
#[derive(Parser)]
#[command(version, about)]
struct Args {
    /// Where sockets are.
    #[arg(long, global = true, default_value = "/run/remus/disk")]
    run: PathBuf,
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    /// Run the service of a disk.
    Serve {
        /// The disk's name, the same on both hosts.
        name: String,
        /// The device or file that it lives on; it must support direct I/O.
        #[arg(long)]
        backing: PathBuf,
        /// Its metadata file. Not on a disk that this service serves.
        #[arg(long)]
        meta: PathBuf,
        /// Memory for writes on their way, and on the backup for those that are held, in MiB.
        #[arg(long, visible_alias = "capacity", default_value_t = 256, value_parser = clap::value_parser!(u64).range(8..=65536))]
        memory: u64,
        /// A file for what a backup holds beyond its memory, NAME.journal beside the metadata if not given. Not on a disk
        /// that this service serves.
        #[arg(long)]
        journal: Option<OsString>,
        /// Its size in MiB, which is set aside at once; 0 for none.
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=1 << 24))]
        journal_size: u64,
        /// Where the link to the block device is made.
        #[arg(long, default_value = "/dev/remus")]
        links: PathBuf,
        /// The device-mapper device that the guest has as its disk, to be moved onto the mirror; what it led to is the backing device.
        // Text, since a path must not be empty, and the unit passes an empty one for none.
        #[arg(long)]
        above: Option<String>,
        /// The N of the /dev/nbdN that is this disk's.
        #[arg(long)]
        nbd: Option<u32>,
        /// How its copy is reached: a shell command, such as `ssh HOST remus-disk connect NAME`, or unix:PATH.
        #[arg(long)]
        via: Option<String>,
        /// UNSAFE under memory pressure: run without locked memory, as any user.
        #[arg(long)]
        unlocked: bool,
    },
    /// Join standard input and output with a disk's service: the other end of the source's `connect`.
    Connect {
        /// The disk's name.
        name: String,
    },
    /// Send a request to a disk's service and print the answer.
    Ctl {
        /// The disk's name.
        name: String,
        /// The command: status, promote, demote, open, close, attach, detach, connect, disconnect, verify, and others.
        command: String,
        /// Its fields, as `name=value`.
        fields: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter()).init();
    let args = Args::parse();
    match args.command {
        Sub::Serve { name, backing, meta, memory, journal, journal_size, links, above, nbd, via, unlocked } => {
            check_name(&name)?;
            let (run, memory) = (args.run, memory << 20);
            let via = via.filter(|via| !via.is_empty());
            let above = above.filter(|device| !device.is_empty()).map(PathBuf::from);
            let journal = (journal_size > 0).then(|| {
                let given = journal.filter(|path| !path.is_empty()).map(PathBuf::from);
                let path = given.unwrap_or_else(|| meta.with_file_name(format!("{name}.journal")));
                JournalConfig { path, size: journal_size << 20 }
            });
            let config = NodeConfig { name, backing, meta, run, links, above, memory, journal, nbd, via };
            if unlocked {
                tracing::warn!("memory is not locked: a dom0 short of memory can hang its guests");
            } else {
                lock_memory()?;
            }
            serve(&config)
        }
        Sub::Connect { name } => {
            check_name(&name)?;
            let socket = args.run.join(format!("{name}.peer"));
            bridge(&socket).with_context(|| format!("{}: does the service of disk {name} run?", socket.display()))
        }
        Sub::Ctl { name, command, fields } => {
            check_name(&name)?;
            let socket = args.run.join(format!("{name}.ctl"));
            let answer = call(&socket, &request(&command, &fields)?)
                .with_context(|| format!("{}: does the service of disk {name} run?", socket.display()))?;
            match answer {
                Response::Ok(value) => println!("{value:#}"),
                Response::Error(text) => bail!(text),
            }
            Ok(())
        }
    }
}

fn filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into())
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        bail!("a disk's name has 1 to 64 letters, digits, '-', '_' and '.', and does not begin with a dot: {name:?}");
    }
    Ok(())
}

/// `value` is a number, `true`, `false`, or else text.
fn request(command: &str, fields: &[String]) -> anyhow::Result<Request> {
    let mut object = serde_json::Map::from_iter([("cmd".to_owned(), command.into())]);
    for field in fields {
        let (name, value) = field.split_once('=').with_context(|| format!("{field:?} is not name=value"))?;
        let value = serde_json::from_str::<serde_json::Value>(value)
            .ok()
            .filter(|v| v.is_number() || v.is_boolean())
            .unwrap_or_else(|| value.into());
        object.insert(name.to_owned(), value);
    }
    Ok(serde_json::from_value(object.into())?)
}

/// A guest's write-back may be what frees the memory that this process waits for (hazard F20).
fn lock_memory() -> anyhow::Result<()> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).context("cannot lock memory; run as root")?;
    rustix::process::configure_io_flusher_behavior(true)
        .context("cannot become an I/O flusher (PR_SET_IO_FLUSHER); run as root")
}

fn serve(config: &NodeConfig) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.run).with_context(|| config.run.display().to_string())?;
    let node = Node::open(config)?;
    tracing::info!(disk = config.name, backing = %config.backing.display(), "ready");
    serve_control(&node, &config.run, &config.name)?;
    Ok(())
}
