//! `xen-test soak`: something breaks every few seconds, for as long as asked.

use std::time::Duration;

use anyhow::Result;

use super::interrupt::interruptible;
use crate::host::MachineOptions;
use crate::pair::{BootOptions, Pair};
use crate::{prepare, soak};

/// Options of `xen-test soak`.
#[derive(Debug, clap::Args)]
pub struct SoakArgs {
    /// How long, in minutes
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Decides what breaks when
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the soak and prints how it went as JSON.
///
/// # Errors
/// The first thing that must not be.
pub fn soak(args: &SoakArgs) -> Result<()> {
    let (time, seed) = (Duration::from_secs(args.minutes * 60), args.seed);
    let tally = interruptible(move || {
        let pair = Pair::boot(&BootOptions { name: "soak".into(), hosts: 2, machine: MachineOptions::default() })?;
        prepare::hosts(&pair)?;
        soak::soak(&pair, time, seed).inspect_err(|_| {
            for host in pair.hosts() {
                let _ = host.collect_logs(&pair.logs().join(host.name()));
            }
        })
    })?;
    println!("{}", serde_json::to_string(&tally)?);
    Ok(())
}
