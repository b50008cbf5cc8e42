//! `run`: scenarios by name.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use super::interrupt::interruptible;
use crate::host::MachineOptions;
use crate::pair::BootOptions;
use crate::scenario;

/// Runs the scenarios that match, none of which begins later than `within`; the last line of standard output is the tally.
pub fn run(patterns: &[String], with_project: bool, within: Option<Duration>) -> Result<ExitCode> {
    let scenarios = scenario::select(patterns)?;
    let options = BootOptions {
        name: format!("run-{}", std::process::id()),
        hosts: scenarios.iter().map(|scenario| scenario.hosts).max().unwrap_or(1),
        machine: MachineOptions::default(),
    };
    let tally = interruptible(move || scenario::run(&scenarios, &options, with_project, within))?;
    println!("{tally}");
    Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
