//! `remusd`: the daemon, and the small programs that only it starts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// High availability for Xen guests by continuous checkpoint replication.
#[derive(Debug, Parser)]
#[command(name = "remusd", version)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

/// Options of the daemon.
#[derive(Debug, clap::Args)]
struct Run {
    /// Where the durable state is.
    #[arg(long, default_value = "/var/lib/remus")]
    state_dir: PathBuf,
    /// Control socket.
    #[arg(long, default_value = "/run/remus/remusd.sock")]
    socket: PathBuf,
    /// Socket at which other hosts' daemons arrive (through `remusd connect`).
    #[arg(long, default_value = remusd::link::bridge::LINK_SOCKET)]
    link_socket: PathBuf,
    /// xl-save-helper to use [default: that of the running Xen; $LIBXL_SAVE_HELPER].
    #[arg(long)]
    save_helper: Option<PathBuf>,
    /// xl to receive with.
    #[arg(long, default_value = "xl")]
    xl: PathBuf,
    /// Configuration file; need not exist.
    #[arg(long, default_value = remusd::config::PATH)]
    config: PathBuf,
    /// For finding faults: keep all capabilities of root, for this process and its children.
    #[arg(long)]
    keep_capabilities: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Carry a link: copies between standard input/output and the daemon's link socket. Run by the peer over ssh.
    Connect {
        /// The daemon's link socket.
        #[arg(long, default_value = remusd::link::bridge::LINK_SOCKET)]
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
        #[arg(long, default_value = remusd::link::bridge::LINK_SOCKET)]
        link_socket: PathBuf,
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

fn main() -> ExitCode {
    let args = Args::parse();
    match args.command {
        Some(Command::Connect { link_socket }) => match remusd::link::bridge::run(&link_socket) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("remusd: {error}");
                ExitCode::from(error.exit_code())
            }
        },
        Some(Command::Pair { socket }) => finish(pair(&socket)),
        Some(Command::ReceiveStock { link_socket }) => finish(receive_stock(link_socket)),
        Some(Command::LogDirty { domain }) => finish(log_dirty(&domain)),
        Some(Command::AuditRead { domain, gfns }) => finish(audit_read(&domain, &gfns)),
        Some(Command::CreateDomain) => finish(create_domain()),
        None => finish(daemon(args.run)),
    }
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("remusd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "xen"))]
fn daemon(_: Run) -> anyhow::Result<()> {
    anyhow::bail!("built without the feature \"xen\": this program cannot talk to a hypervisor")
}

#[cfg(not(feature = "xen"))]
fn create_domain() -> anyhow::Result<()> {
    anyhow::bail!("built without the feature \"xen\": this program cannot talk to a hypervisor")
}

fn pair(socket: &std::path::Path) -> anyhow::Result<()> {
    // Set by sshd: the client's address and port, ours and our port.
    let came_from = std::env::var("SSH_CONNECTION").ok().and_then(|text| Some(text.split(' ').next()?.to_owned()));
    let socket = remusd::pair::socket::beside(socket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(remusd::pair::exchange::serve(
        &socket,
        came_from,
        tokio::io::BufReader::new(tokio::io::stdin()),
        tokio::io::stdout(),
    ));
    // A read of standard input may still be under way on its own thread.
    runtime.shutdown_background();
    Ok(result?)
}

fn receive_stock(link_socket: PathBuf) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(remusd::backup::from_stock::receive(link_socket));
    // A read of standard input may still be under way on its own thread.
    runtime.shutdown_background();
    Ok(result?)
}

#[cfg(not(feature = "xen"))]
fn log_dirty(_: &str) -> anyhow::Result<()> {
    anyhow::bail!("built without the feature \"xen\": this program cannot talk to a hypervisor")
}

#[cfg(feature = "xen")]
fn log_dirty(typed: &str) -> anyhow::Result<()> {
    use std::sync::Arc;

    use remusd::xen::{Hypervisor, RealStore, XenHypervisor, XenStore};
    remusd::xen::soname::ensure()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let on = runtime.block_on(async {
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(XenHypervisor::open()?);
        let store: Arc<dyn XenStore> = Arc::new(RealStore::open().await?);
        let found = remusd::daemon::resolve::domain(&hypervisor, &store, typed).await?;
        anyhow::Ok(hypervisor.log_dirty_is_on(found.info.domid).await?)
    })?;
    println!("{}", if on { "on" } else { "off" });
    Ok(())
}

#[cfg(not(feature = "xen"))]
fn audit_read(_: &str, _: &[u64]) -> anyhow::Result<()> {
    anyhow::bail!("built without the feature \"xen\": this program cannot talk to a hypervisor")
}

#[cfg(feature = "xen")]
fn audit_read(typed: &str, gfns: &[u64]) -> anyhow::Result<()> {
    use std::sync::Arc;

    use remusd::xen::{GuestPages, Hypervisor, RealStore, XenHypervisor, XenPages, XenStore};
    remusd::xen::soname::ensure()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (hashes, took) = runtime.block_on(async {
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(XenHypervisor::open()?);
        let store: Arc<dyn XenStore> = Arc::new(RealStore::open().await?);
        let domid = remusd::daemon::resolve::domain(&hypervisor, &store, typed).await?.info.domid;
        let pages = XenPages::open()?;
        let start = std::time::Instant::now();
        let hashes = pages.hashes(domid, gfns.to_vec()).await?;
        anyhow::Ok((hashes, start.elapsed()))
    })?;
    for (gfn, hash) in gfns.iter().zip(&hashes) {
        match hash {
            Some(hash) => println!("{gfn:#x} {hash:032x}"),
            None => println!("{gfn:#x} -"),
        }
    }
    println!("{} of {} pages in {} us", hashes.iter().flatten().count(), gfns.len(), took.as_micros());
    Ok(())
}

#[cfg(feature = "xen")]
fn create_domain() -> anyhow::Result<()> {
    use std::io::Read;
    let mut json = String::new();
    std::io::stdin().read_to_string(&mut json)?;
    let json = remusd::stream::save_file::config_for_receiver(&json)?;
    let domid = remusd::xen::create::create_domain(&json)?;
    println!("{domid}");
    Ok(())
}

#[cfg(feature = "xen")]
fn daemon(run: Run) -> anyhow::Result<()> {
    remusd::xen::soname::ensure()?;
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("REMUSD_LOG").unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    if !run.keep_capabilities {
        // Later it will not be allowed any more.
        devices::netbuffer::modules::load();
        if let Err(error) = remusd::daemon::privileges::drop_all_but_needed() {
            tracing::warn!("running with more privileges than needed: {error}");
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(remusd::daemon::run::run(remusd::daemon::run::Settings {
        state_dir: run.state_dir,
        socket: run.socket,
        link_socket: run.link_socket,
        save_helper: run.save_helper,
        xl: run.xl,
        config: remusd::config::Config::load(&run.config)?,
    }))
}
