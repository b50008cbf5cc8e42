//! `up`: hosts that stay until they are ended.

use anyhow::{Context, Result};
use clap::Args;

use crate::host::MachineOptions;
use crate::pair::{BootOptions, Pair};
use crate::progress;

/// Arguments of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Name of the run: several can be up at once under different names
    #[arg(long, default_value = "default")]
    name: String,
    /// How many hosts: 1 or 2
    #[arg(long, default_value_t = 1)]
    hosts: usize,
    /// Memory of each host, in MiB
    #[arg(long, default_value_t = MachineOptions::default().memory)]
    memory: u32,
    /// Memory of each dom0, in MiB
    #[arg(long, default_value_t = MachineOptions::default().dom0_memory)]
    dom0_memory: u32,
    /// CPUs of each host
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Use the C xenstored in place of oxenstored
    #[arg(long)]
    c_xenstored: bool,
}

impl UpArgs {
    fn boot_options(&self, snapshot: bool) -> BootOptions {
        BootOptions {
            name: self.name.clone(),
            hosts: self.hosts,
            machine: MachineOptions {
                memory: self.memory,
                dom0_memory: self.dom0_memory,
                cpus: self.cpus,
                c_xenstored: self.c_xenstored,
                ..MachineOptions::default()
            },
            snapshot,
        }
    }
}

/// Boots and waits for SIGINT, SIGTERM or SIGHUP.
pub fn up(args: &UpArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let options = args.boot_options(false);
    runtime.block_on(async {
        let ended = end_signal()?;
        let booting = tokio::task::spawn_blocking(move || Pair::boot(&options));
        tokio::pin!(ended);
        let pair = tokio::select! {
            pair = booting => pair.context("the boot panicked")??,
            () = &mut ended => {
                // The kernel ends the hosts and their network with this process.
                progress!("interrupted while booting");
                std::process::exit(130);
            }
        };
        let name = &args.name;
        progress!("up: `xen-test exec --name {name} a 'xl list'`, `xen-test down --name {name}`");
        ended.await;
        progress!("ending {name}");
        drop(pair);
        Ok(())
    })
}

/// A future that ends at the first SIGINT, SIGTERM or SIGHUP from now on.
fn end_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
            _ = hup.recv() => {}
        }
    })
}
