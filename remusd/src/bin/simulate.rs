//! Searches for schedules that break the safety rules. docs/reliability.md says how.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use remusd::simulate::campaign::{Order, Summary, campaign};
use remusd::simulate::{Plan, World, shrink};

/// Runs remusd's state machines under simulated faults and checks the safety rules after every step.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Threads. As many as there are processors unless said.
    #[arg(long)]
    jobs: Option<usize>,
    /// Shows the schedule of this seed step by step, made as small as it still breaks the same rule.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// With --replay: shows the whole schedule as it is.
    #[arg(long)]
    whole: bool,
    /// Takes away, one by one, the lines that enforce the rules; each must be missed within --seeds seeds. Needs the feature `mutants`.
    #[arg(long)]
    mutants: bool,
    /// Prints how often each machine has met each event in each state.
    #[arg(long)]
    coverage: bool,
    /// Prints results as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let good = match args.replay {
        Some(seed) => replay(seed, args.whole),
        None if args.mutants => mutants(&args),
        None => search(&args),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn replay(seed: u64, whole: bool) -> bool {
    let plan = Plan::of(seed);
    let mut world = World::new(&plan);
    world.run();
    let found = world.oracle.violation;
    let plan = match &found {
        Some(violation) if !whole => shrink::shrink(&plan, violation.rule),
        _ => plan,
    };
    let mut world = World::new(&plan);
    world.trace = Some(Vec::new());
    world.run();
    let mut out = std::io::stdout().lock();
    // A reader that has seen enough is no error.
    let _ = writeln!(out, "{plan:#?}");
    for line in world.trace.unwrap_or_default() {
        if writeln!(out, "{line}").is_err() {
            break;
        }
    }
    found.is_none()
}

fn jobs(args: &Args) -> usize {
    args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

#[cfg(not(feature = "mutants"))]
fn mutants(_: &Args) -> bool {
    eprintln!(
        "This build has every line that enforces a rule; lines can be taken away with:\n\
         cargo run --release --features mutants --bin simulate -- --mutants"
    );
    false
}

#[cfg(feature = "mutants")]
fn mutants(args: &Args) -> bool {
    let told = |fate: &remusd::simulate::mutants::Fate| {
        if args.json {
            return;
        }
        let mutant = fate.mutant;
        match &fate.caught {
            Some((seed, runs, violation)) if fate.good() => {
                println!(
                    "caught   {:<36} seed {seed}, {runs} runs, {}: {}",
                    mutant.line, violation.rule, violation.text
                );
            }
            Some((seed, _, violation)) => {
                println!("ASTRAY   {:<36} seed {seed}, {}: {}", mutant.line, violation.rule, violation.text);
            }
            None => println!("MISSED   {:<36} {} seeds: {}", mutant.line, args.seeds, mutant.about),
        }
    };
    let fates = remusd::simulate::mutants::check(args.start, args.seeds, jobs(args), &told);
    if args.json {
        let row = |fate: &remusd::simulate::mutants::Fate| {
            let caught = fate.caught.as_ref().map(|(seed, runs, violation)| {
                serde_json::json!({ "seed": seed, "runs": runs, "rule": format!("{:?}", violation.rule), "text": violation.text })
            });
            serde_json::json!({ "line": fate.mutant.line, "good": fate.good(), "caught": caught })
        };
        println!("{}", serde_json::Value::from(fates.iter().map(row).collect::<Vec<_>>()));
    }
    fates.iter().all(remusd::simulate::mutants::Fate::good)
}

fn search(args: &Args) -> bool {
    let began = Instant::now();
    let jobs = jobs(args);
    let show = !args.json && std::io::stderr().is_terminal();
    let progress = |done: u64| {
        if show && done.is_multiple_of(1024) {
            let rate = done as f64 / began.elapsed().as_secs_f64();
            eprint!("\r{done} of {} seeds, {rate:.0} a second", args.seeds);
        }
    };
    let order = Order { start: args.start, seeds: args.seeds, jobs, coverage: args.coverage, without: None };
    let summary = campaign(order, &progress);
    if show {
        eprintln!();
    }
    let seconds = began.elapsed().as_secs_f64();
    if args.json {
        json(args, &summary, seconds);
    } else {
        words(args, &summary, seconds);
    }
    summary.violation.is_none()
}

fn words(args: &Args, summary: &Summary, seconds: f64) {
    for ((machine, state, event), times) in &summary.coverage {
        println!("{machine:<9} {state:<14} {event:<28} {times}");
    }
    println!(
        "{} runs from seed {} in {seconds:.1} s ({:.0} a second): {} events, {:.0} s of simulated time, {} epochs acknowledged, \
         {} copies started, {} answers to the client",
        summary.runs,
        args.start,
        summary.runs as f64 / seconds,
        summary.events,
        summary.time as f64 / 1e6,
        summary.tally.acked,
        summary.tally.started,
        summary.tally.answers
    );
    match &summary.violation {
        None => println!("No rule was broken."),
        Some((seed, violation)) => println!(
            "VIOLATION: seed {seed} breaks {} after {:.3} ms: {}\nSee it with --replay {seed}",
            violation.rule,
            violation.at as f64 / 1000.0,
            violation.text
        ),
    }
}

fn json(args: &Args, summary: &Summary, seconds: f64) {
    let coverage: Vec<_> = summary
        .coverage
        .iter()
        .map(|((machine, state, event), times)| serde_json::json!([machine, state, event, times]))
        .collect();
    let violation = summary.violation.as_ref().map(|(seed, violation)| {
        serde_json::json!({ "seed": seed, "rule": format!("{:?}", violation.rule), "at_us": violation.at, "text": violation.text })
    });
    println!(
        "{}",
        serde_json::json!({
            "start": args.start, "runs": summary.runs, "seconds": seconds, "events": summary.events,
            "simulated_seconds": summary.time / 1_000_000, "epochs": summary.tally.acked, "started": summary.tally.started,
            "answers": summary.tally.answers, "coverage": coverage, "violation": violation,
        })
    );
}
