//! `xen-test bench`: against stock `xl remus`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::interrupt::interruptible;
use crate::bench::{Plan, bench, plots, table};
use crate::host::MachineOptions;
use crate::pair::{BootOptions, Pair};
use crate::{prepare, progress};

/// Options of `xen-test bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Write every row and the goals to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the figures, as SVG files in this directory
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// One row for each goal instead of the whole matrix
    #[arg(long)]
    quick: bool,
}

/// Runs the benchmark and prints its table.
///
/// # Errors
/// The first thing that cannot be measured.
pub fn run(args: &BenchArgs) -> Result<()> {
    let plan = if args.quick { Plan::quick() } else { Plan::full() };
    let report = interruptible(move || {
        let pair =
            Pair::boot(&BootOptions { name: "bench".into(), hosts: plan.hosts(), machine: MachineOptions::default() })?;
        prepare::hosts(&pair)?;
        let report = bench(&pair, &plan);
        if report.incomplete.is_some() {
            for host in pair.hosts() {
                let _ = host.collect_logs(&pair.logs().join(host.name()));
            }
        }
        Ok(report)
    })?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(dir) = &args.plots {
        for name in plots(&report, dir)? {
            progress!("drawn: {}", dir.join(name).display());
        }
    }
    println!("{}", table(&report));
    match report.incomplete {
        Some(why) => bail!("not everything could be measured: {why}"),
        None => Ok(()),
    }
}
