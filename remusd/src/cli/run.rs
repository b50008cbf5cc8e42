//! Carries a typed command to the daemon and shows the answer.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::{Args, Command};
use super::render;
use crate::api::client::{Call, hung_up};
use crate::api::{ApiError, ErrorCode, Reply, Request, StatusRow};
use crate::ops::operation::Job;
use crate::ops::{Event, EventKind};

/// The exit code of a failure; `remus --help` has the list.
#[must_use]
pub fn exit_code(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::Failed => 1,
        ErrorCode::Invalid => 2,
        ErrorCode::Denied => 3,
        ErrorCode::NotFound => 4,
        ErrorCode::Conflict => 5,
        ErrorCode::Unsupported => 6,
        ErrorCode::Peer => 7,
        ErrorCode::Cancelled => 9,
    }
}

/// A foreground protection has ended and left the guest unprotected.
const UNPROTECTED: u8 = 8;

/// Runs one command to its end.
pub async fn run(args: &Args) -> ExitCode {
    let done = match elsewhere(args).await {
        Some(done) => done,
        None => asked(args).await,
    };
    ExitCode::from(done.unwrap_or_else(|error| fail(args, &error)))
}

/// What is not one request of the control API.
async fn elsewhere(args: &Args) -> Option<Result<u8, ApiError>> {
    match &args.command {
        Command::Top { domain } => Some(super::top::run(&args.socket(), domain.clone()).await),
        Command::Enable(enable) => Some(said(args, super::enable::enable(&args.socket(), enable).await)),
        Command::Disable(disable) => Some(said(args, super::enable::disable(&args.socket(), disable).await)),
        Command::Gate(gate) => Some(run_gate(args, gate).await),
        Command::Disk(super::disk::Disk { command: super::disk::DiskCommand::Verify { .. } }) => None,
        Command::Disk(disk) => Some(run_disk(args, disk).await),
        Command::Doctor(doctor) => Some(Ok(super::doctor::doctor(doctor, args.json))),
        Command::Completions { shell } => {
            use clap::CommandFactory;
            clap_complete::generate(*shell, &mut Args::command(), "remus", &mut std::io::stdout());
            Some(Ok(0))
        }
        Command::Man { folder } => Some(match super::manual::write(folder) {
            Ok(count) => {
                said(args, Ok(serde_json::json!({ "message": format!("{count} pages in {}", folder.display()) })))
            }
            Err(error) => Err(ApiError::new(ErrorCode::Failed, format!("{}: {error}", folder.display()))),
        }),
        _ => None,
    }
}

fn said(args: &Args, done: Result<serde_json::Value, ApiError>) -> Result<u8, ApiError> {
    done.map(|value| {
        show_message(args, &value);
        0
    })
}

async fn asked(args: &Args) -> Result<u8, ApiError> {
    match pairing(args).await {
        Some(done) => said(args, done),
        None => match args.request() {
            Ok(Request::AssumeAlone { domain, .. }) if !said_yes(args) && !confirmed(&domain) => {
                Err(ApiError::new(ErrorCode::Conflict, "nothing was done"))
            }
            Ok(request) => within(&args.command, talk(args, request)).await,
            Err(text) => Err(ApiError::new(ErrorCode::Invalid, text)),
        },
    }
}

/// Waits for the end of an abort no longer than was said. Hanging up takes nothing back.
async fn within(command: &Command, asked: impl Future<Output = Result<u8, ApiError>>) -> Result<u8, ApiError> {
    let Command::Abort { job, timeout: Some(seconds), .. } = command else { return asked.await };
    tokio::time::timeout(Duration::from_secs(*seconds), asked).await.unwrap_or_else(|_| {
        let text = format!("job {job} was told to give up and has not ended within {seconds} s; `remus jobs` and the event of its end say \
                            what it became");
        Err(ApiError::new(ErrorCode::Failed, text))
    })
}

/// What goes to the pairing socket; `None` for everything else.
async fn pairing(args: &Args) -> Option<Result<serde_json::Value, ApiError>> {
    let socket = args.socket();
    Some(match &args.command {
        Command::Pair(pair) => super::pair::pair(&socket, pair, args.json).await,
        Command::Unpair { host } => super::pair::unpair(&socket, host).await,
        Command::Peers => super::pair::peers(&socket).await,
        Command::Keys { keys } => super::pair::keys(&socket, *keys).await,
        _ => return None,
    })
}

fn said_yes(args: &Args) -> bool {
    matches!(args.command, Command::AssumeAlone { yes: true, .. })
}

/// Says what it risks and asks.
fn confirmed(domain: &str) -> bool {
    use std::io::{BufRead, Write};
    eprint!(
        "If another copy of {domain} runs, or comes to run, there will be two: clients see both, and what one of them wrote is lost.\n\
         If the other host has gone on without this one, what it did since is lost to the clients of this copy.\n\
         Go on only if you KNOW that the other host is off or does not run {domain}. Type the domain's name to go on: "
    );
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).is_ok() && line.trim() == domain
}

async fn run_disk(args: &Args, disk: &super::disk::Disk) -> Result<u8, ApiError> {
    let value = super::disk::run(disk).await?;
    match value.as_array() {
        Some(rows) if !args.json => {
            for row in rows {
                let status = serde_json::from_value(row.clone());
                let status = status.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))?;
                println!("{}", super::disk::line(&status));
            }
        }
        Some(_) => println!("{value}"),
        None => show_message(args, &value),
    }
    Ok(0)
}

#[cfg(feature = "xen")]
async fn run_gate(args: &Args, gate: &crate::gate::command::GateArgs) -> Result<u8, ApiError> {
    let failed = |error: &dyn std::fmt::Display| ApiError::new(ErrorCode::Failed, error.to_string());
    let places = crate::gate::install::Places::default();
    let done = match (&gate.command, crate::xen::RealStore::open().await) {
        (crate::gate::command::GateCommand::Install, _) => crate::gate::command::install(&places),
        (_, Ok(store)) => crate::gate::command::run(gate, &places, &store).await,
        (_, Err(error)) => return Err(failed(&error)),
    };
    let text = done.map_err(|error| failed(&error))?;
    show_message(args, &serde_json::json!({ "message": text }));
    Ok(0)
}

#[cfg(not(feature = "xen"))]
async fn run_gate(_: &Args, _: &crate::gate::command::GateArgs) -> Result<u8, ApiError> {
    Err(ApiError::new(ErrorCode::Unsupported, "built without the feature \"xen\""))
}

fn fail(args: &Args, error: &ApiError) -> u8 {
    if args.json {
        println!("{}", serde_json::json!({ "error": error }));
    } else {
        eprintln!("remus: {error}");
    }
    exit_code(error.code)
}

async fn talk(args: &Args, request: Request) -> Result<u8, ApiError> {
    let foreground = match &request {
        Request::Protect { foreground: true, domain, .. } => Some(domain.clone()),
        _ => None,
    };
    let mut interrupted = std::pin::pin!(interruption(foreground.is_some()));
    let mut stopping = None;
    let mut call = Call::start(&args.socket(), &request).await?;
    let bar = progress_bar(args);
    let mut unprotected = false;
    loop {
        let reply = tokio::select! {
            reply = call.next() => reply?,
            () = &mut interrupted, if stopping.is_none() => {
                // Kept until the end, which comes on the first connection.
                let domain = foreground.clone().unwrap_or_default();
                stopping = Some(Call::start(&args.socket(), &Request::Unprotect { domain, tag: None }).await?);
                continue;
            }
        };
        let Some(reply) = reply else { return Err(hung_up()) };
        match reply {
            Reply::Error(error) => {
                bar.finish_and_clear();
                return Err(error);
            }
            Reply::Result(value) => {
                bar.finish_and_clear();
                show_result(args, value)?;
                return Ok(if foreground.is_some() && unprotected { UNPROTECTED } else { 0 });
            }
            Reply::Event(event) => {
                unprotected |= event.kind == EventKind::Unprotected;
                bar.suspend(|| show_event(args, &event));
            }
            other if args.json => println!("{}", serde_json::to_string(&other).unwrap_or_default()),
            Reply::Missed(count) => bar.suspend(|| println!("({count} events missed)")),
            Reply::Progress(progress) => {
                bar.set_length(progress.total.max(progress.pages));
                bar.set_position(progress.pages);
                bar.set_message(format!("{} MiB sent", progress.bytes >> 20));
            }
            Reply::Rows(_) => {}
        }
    }
}

/// Ends at Ctrl-C or SIGTERM, if those are to mean anything but the end of this program.
async fn interruption(wanted: bool) {
    use tokio::signal::unix::{SignalKind, signal};
    if !wanted {
        return std::future::pending().await;
    }
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

fn progress_bar(args: &Args) -> ProgressBar {
    if args.json || !matches!(args.command, Command::Protect(_)) {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("first copy {bar:30} {percent}% {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn show_event(args: &Args, event: &Event) {
    if args.json {
        println!("{}", serde_json::json!({ "event": event }));
    } else {
        println!("{}", render::event(event, render::Paint::of_stdout()));
    }
}

/// A member of a result as what it is.
fn member<T: serde::de::DeserializeOwned>(value: &mut serde_json::Value, name: &str) -> Result<T, ApiError> {
    let member = value.get_mut(name).map(serde_json::Value::take).unwrap_or_default();
    serde_json::from_value(member).map_err(|error| unreadable(name, &error))
}

fn unreadable(what: &str, error: &serde_json::Error) -> ApiError {
    let text = format!("The answer's {what} cannot be read: {error}. Is remusd of another version?");
    ApiError::new(ErrorCode::Failed, text)
}

fn show_result(args: &Args, mut value: serde_json::Value) -> Result<(), ApiError> {
    let paint = render::Paint::of_stdout();
    match &args.command {
        Command::Status { .. } => {
            let rows: Vec<StatusRow> = member(&mut value, "rows")?;
            if args.json {
                println!("{}", serde_json::to_string(&rows).unwrap_or_default());
            } else {
                println!("{}", render::status(&rows, paint));
            }
        }
        Command::Trace(typed) => {
            let trace = serde_json::from_value(value).map_err(|error| unreadable("trace", &error))?;
            if let Some(text) = super::trace::show(typed, &trace)? {
                show_message(args, &serde_json::json!({ "message": text }));
            }
        }
        Command::Jobs => {
            let jobs: Vec<Job> = member(&mut value, "jobs")?;
            if args.json {
                println!("{}", serde_json::to_string(&jobs).unwrap_or_default());
            } else {
                println!("{}", render::jobs(&jobs, paint));
            }
        }
        Command::Events { .. } => {
            let events: Vec<Event> = member(&mut value, "events")?;
            for event in events {
                show_event(args, &event);
            }
        }
        _ => show_message(args, &value),
    }
    Ok(())
}

fn show_message(args: &Args, value: &serde_json::Value) {
    if args.json {
        println!("{}", serde_json::json!({ "result": value }));
    } else if let Some(text) = value.get("message").and_then(|v| v.as_str()) {
        println!("{text}");
    } else if let Some(job) = value.get("job") {
        println!("job {job}");
    }
}
