//! `up`: hosts that stay until they are ended.

use std::sync::Arc;

use anyhow::Result;
use clap::Args;

use super::interrupt;
use crate::host::{MachineOptions, Snapshot};
use crate::pair::{BootOptions, Pair};
use crate::{control, prepare, progress};

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
    /// Build remusd and remus and install them in the dom0s
    #[arg(long)]
    install: bool,
}

impl UpArgs {
    /// A closure that boots and prepares what these arguments ask for, and opens it to others.
    pub fn starter(&self) -> impl FnOnce() -> Result<Arc<Pair>> + Send + 'static {
        let (options, install) = (self.boot_options(), self.install);
        move || {
            let pair = Pair::boot(&options)?;
            prepare::guests(&pair)?;
            if install {
                prepare::project(&pair)?;
            }
            pair.snapshot(Snapshot::Ready)?;
            let pair = Arc::new(pair);
            control::serve(&pair)?;
            pair.announce()?;
            Ok(pair)
        }
    }

    fn boot_options(&self) -> BootOptions {
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
        }
    }
}

/// Boots and waits for SIGINT, SIGTERM or SIGHUP.
pub fn up(args: &UpArgs) -> Result<()> {
    let name = &args.name;
    interrupt::until_signal(args.starter(), |_| {
        progress!("up: `xen-test exec --name {name} a 'xl list'`, `xen-test down --name {name}`");
    })
}
