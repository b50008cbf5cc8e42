//! `remusd`: the daemon, and the small programs that only it starts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use remusd::cli::daemon::{Args, Command, Run};

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
        Some(Command::CheckConfig { config, policies }) => check_config(&config, &policies),
        Some(Command::LogDirty { domain }) => finish(log_dirty(&domain)),
        Some(Command::AuditRead { domain, gfns }) => finish(audit_read(&domain, &gfns)),
        Some(Command::CreateDomain) => finish(create_domain()),
        None => finish(daemon(args.run)),
    }
}

fn check_config(config: &std::path::Path, policies: &std::path::Path) -> ExitCode {
    let report = remusd::config::check(config, policies);
    for line in &report.stands {
        println!("{line}");
    }
    for line in &report.wrong {
        eprintln!("{line}");
    }
    if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
    let loaded = match remusd::config::Loaded::read(&run.config) {
        Ok(loaded) => loaded,
        Err(errors) => {
            let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
            anyhow::bail!(
                "the configuration cannot be used (remusd check-config says the same):\n{}",
                lines.join("\n")
            );
        }
    };
    let log = remusd::daemon::logging::LogFilter::start(&loaded.config.log.filter);
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
        config_path: run.config,
        config: loaded.config,
        policies: run.policies,
        log,
    }))
}
