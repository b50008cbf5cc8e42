//! Runs scenarios on one booted pair, with a reset before each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{Ctx, Scenario, Skip, report};
use crate::host::Snapshot;
use crate::pair::{BootOptions, Pair};
use crate::{prepare, progress};

/// Longest time for one scenario. One that hangs longer ends the whole run: its thread cannot be
/// taken from it.
const SCENARIO_LIMIT: Duration = Duration::from_secs(15 * 60);

/// How a set of scenarios went.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Ran to their end without an error.
    pub passed: usize,
    /// Failed, or could not be run: each with its reason.
    pub failed: Vec<(&'static str, String)>,
    /// Said themselves that they cannot run here, or were not begun.
    pub skipped: usize,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped)
    }
}

enum Outcome {
    Passed,
    Failed(anyhow::Error),
    Skipped(String),
    Hung,
}

/// Runs the scenarios one after the other; a failed one does not stop the rest. The hosts have the
/// test guest, and the project's programs if `with_project`. Those whose turn comes later than `within` are skipped.
///
/// # Errors
/// The hosts could not be booted at all.
pub fn run(
    scenarios: &[Scenario],
    options: &BootOptions,
    with_project: bool,
    within: Option<Duration>,
) -> Result<Tally> {
    let begun = Instant::now();
    let mut tally = Tally::default();
    let mut pair: Option<Arc<Pair>> = None;
    for (index, scenario) in scenarios.iter().enumerate() {
        progress!("[{}/{}] {}: {}", index + 1, scenarios.len(), scenario.name, scenario.about);
        let late = within.is_some_and(|limit| begun.elapsed() > limit).then_some("the time for this run is over");
        if let Some(reason) = unshown(scenario.name).or(late) {
            tally.skipped += 1;
            progress!("{}: skipped: {reason}", scenario.name);
            continue;
        }
        let ready = match pair.take() {
            Some(booted) => booted,
            None => boot(options, with_project)?,
        };
        let made = ready.ensure(scenario.start);
        let ready = if made.is_ok() { reset_or_boot(ready, scenario.start, options, with_project)? } else { ready };
        let logs = ready.logs().join(scenario.name);
        std::fs::create_dir_all(&logs)?;
        let start = Instant::now();
        let outcome = match made {
            Ok(()) => run_one(scenario, &ready, &logs),
            Err(error) => Outcome::Failed(error.context("what it starts from cannot be made")),
        };
        let took = start.elapsed().as_secs_f32();
        match outcome {
            Outcome::Passed => {
                tally.passed += 1;
                progress!("{}: passed in {took:.1} s", scenario.name);
            }
            Outcome::Skipped(reason) => {
                tally.skipped += 1;
                progress!("{}: skipped: {reason}", scenario.name);
            }
            Outcome::Failed(error) => {
                progress!("{}: FAILED after {took:.1} s: {error:#}", scenario.name);
                tally.failed.push((scenario.name, format!("{error:#}")));
                report::failure(&ready, &logs);
            }
            Outcome::Hung => {
                progress!("{}: FAILED: still running after {took:.0} s", scenario.name);
                report::failure(&ready, &logs);
                tally.failed.push((scenario.name, format!("still running after {took:.0} s")));
                let rest = scenarios[index + 1..].iter().map(|next| (next.name, "not run after that".to_owned()));
                tally.failed.extend(rest);
                break;
            }
        }
        pair = Some(ready);
    }
    // Once more where it is found: a long run's log is often cut to its end.
    for (name, reason) in &tally.failed {
        progress!("failed: {name}: {reason}");
    }
    Ok(tally)
}

fn boot(options: &BootOptions, with_project: bool) -> Result<Arc<Pair>> {
    let pair = Pair::boot(options)?;
    prepare::guests(&pair)?;
    if with_project {
        prepare::project(&pair)?;
    }
    pair.snapshot(Snapshot::Ready)?;
    Ok(Arc::new(pair))
}

fn reset_or_boot(pair: Arc<Pair>, to: Snapshot, options: &BootOptions, with_project: bool) -> Result<Arc<Pair>> {
    let start = Instant::now();
    match pair.reset(to) {
        Ok(()) => {
            progress!("hosts reset in {:.1} s", start.elapsed().as_secs_f32());
            Ok(pair)
        }
        Err(error) => {
            progress!("reset failed, booting anew: {error:#}");
            drop(pair);
            let pair = boot(options, with_project).context("after a failed reset")?;
            pair.ensure(to)?;
            pair.reset(to)?;
            Ok(pair)
        }
    }
}

/// Why a scenario is not run unless asked for: it is written, but no run has shown it to pass yet.
fn unshown(name: &str) -> Option<&'static str> {
    let asked = std::env::var_os("XEN_TEST_UNSHOWN").is_some();
    (super::UNSHOWN.contains(&name) && !asked).then_some("no run has shown it to pass yet; XEN_TEST_UNSHOWN=1 runs it")
}

fn run_one(scenario: &Scenario, pair: &Arc<Pair>, logs: &Path) -> Outcome {
    let (sender, receiver) = channel();
    let (run, name) = (scenario.run, scenario.name);
    let (pair, logs) = (pair.clone(), logs.to_owned());
    std::thread::spawn(move || {
        let mut ctx = Ctx { pair: &pair, name, logs: &logs };
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut ctx)));
        // Given back before the outcome is known, so that a new boot finds the name free.
        drop(pair);
        let _ = sender.send(result);
    });
    match receiver.recv_timeout(SCENARIO_LIMIT) {
        Ok(Ok(Ok(()))) => Outcome::Passed,
        Ok(Ok(Err(error))) => match error.downcast::<Skip>() {
            Ok(Skip(reason)) => Outcome::Skipped(reason),
            Err(error) => Outcome::Failed(error),
        },
        Ok(Err(panic)) => Outcome::Failed(anyhow!("panicked: {}", panic_text(&*panic))),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Outcome::Hung,
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no text)")
}
