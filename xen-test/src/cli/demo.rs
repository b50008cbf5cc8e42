//! The main job in one command: two hosts, a guest, a client, a power loss.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use remusd::api::Role;
use serde::Serialize;
use xen_test_guest::xl::{GuestSpec, Kind};

use super::interrupt::interruptible;
use crate::host::MachineOptions;
use crate::pair::{BootOptions, Pair};
use crate::protection::{Carrier, Guest, Protected, fail_over, protect_over, row, start_daemons, wait_epochs};
use crate::{prepare, progress};

/// Options of `xen-test demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The figures.
#[derive(Debug, Serialize)]
struct Figures {
    /// Epochs acknowledged before the power loss.
    checkpoints: u64,
    /// From the power loss until the backup said that the primary is lost.
    kill_to_detect_ms: u64,
    /// From the power loss until the guest's next byte reached the client.
    kill_to_first_byte_ms: u64,
    /// Whether the connection from before is still the one.
    connection_survived: bool,
    /// Counter values that never came.
    counter_gaps: u64,
    /// Counter values that came twice or out of order.
    counter_regressions: u64,
}

/// Runs the demo.
///
/// # Errors
/// When anything is not as it should be; the figures are written all the same if there are any.
pub fn demo(args: &DemoArgs) -> Result<()> {
    let figures = interruptible(|| {
        let pair = Pair::boot(&BootOptions { name: "demo".into(), hosts: 2, machine: MachineOptions::default() })?;
        prepare::hosts(&pair)?;
        story(&pair)
    })?;
    if let Some(path) = &args.json {
        write(path, &figures)?;
    }
    ensure!(figures.connection_survived, "the connection did not survive");
    ensure!(figures.counter_gaps == 0 && figures.counter_regressions == 0, "the counter was not whole: {figures:?}");
    Ok(())
}

fn write(path: &Path, figures: &Figures) -> Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(figures)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

fn story(pair: &Pair) -> Result<Figures> {
    start_daemons(pair)?;
    progress!("host A starts a guest; a client outside both hosts opens a TCP connection to it");
    let Protected { guest, client } = Protected::of(Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?)?;
    progress!("remus protect guest hostb: first copy to host B");
    protect_over(Carrier::Usual, pair.a(), "guest", "")?;
    println!("{}", pair.a().sh("remus status")?);
    progress!("protected; a few seconds of checkpoints");
    wait_epochs(pair.a(), "guest", 10)?;
    let checkpoints = row(pair.a(), "guest", Role::Primary)?.and_then(|r| r.acked).map_or(0, |epoch| epoch.0 + 1);
    let before = client.last().context("the counter never came")?.line.n;
    progress!("the client has counted to {before}. Host A loses its power NOW");
    pair.a().power_off();
    let failover = fail_over(pair.b(), &guest, &client, Instant::now())?;
    progress!(
        "host B noticed after {:.1} s; an operator ran `remus failover guest --primary-is-off`",
        failover.detect.as_secs_f32()
    );
    progress!(
        "the guest's next byte reached the client {:.1} s after the power loss",
        failover.first_byte.as_secs_f32()
    );
    let went_on = client.wait_for(before + 100, Duration::from_secs(60)).is_some();
    guest.is_the_same()?;
    guest.verify()?;
    println!("{}", pair.b().sh("xl list; remus status")?);
    let report = client.report();
    let figures = Figures {
        checkpoints,
        kill_to_detect_ms: failover.detect.as_millis().try_into()?,
        kill_to_first_byte_ms: failover.first_byte.as_millis().try_into()?,
        connection_survived: went_on && report.ended.is_none(),
        counter_gaps: report.gaps,
        counter_regressions: report.regressions + report.time_regressions,
    };
    let last = client.last().map_or(0, |a| a.line.n);
    progress!(
        "the same connection has counted on to {last}: {} gaps, {} regressions; the guest's memory pattern is intact",
        figures.counter_gaps,
        figures.counter_regressions
    );
    println!(
        "\n{} checkpoints were acknowledged; the loss was detected after {} ms, the client heard the guest again after {} ms\n\
         (emulated hosts: the detection time alone is set to {} ms; on hardware the default is 1000 ms)",
        figures.checkpoints,
        figures.kill_to_detect_ms,
        figures.kill_to_first_byte_ms,
        crate::protection::DETECTION.as_millis()
    );
    Ok(figures)
}
