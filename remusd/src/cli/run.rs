//! Carries a typed command to the daemon and shows the answer.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::{Args, Command};
use super::render;
use crate::api::client::Call;
use crate::api::{ApiError, ErrorCode, Reply, Request, StatusRow};
use crate::ops::EventKind;

fn exit_code(code: ErrorCode) -> ExitCode {
    ExitCode::from(match code {
        ErrorCode::Failed => 1,
        ErrorCode::Invalid => 2,
        ErrorCode::Denied => 3,
        ErrorCode::NotFound => 4,
        ErrorCode::Conflict => 5,
        ErrorCode::Unsupported => 6,
        ErrorCode::Peer => 7,
    })
}

/// Runs one command to its end.
pub async fn run(args: &Args) -> ExitCode {
    if let Some(done) = pairing(args).await {
        return match done {
            Ok(value) if args.json => {
                println!("{}", serde_json::json!({ "result": value }));
                ExitCode::SUCCESS
            }
            Ok(value) => {
                println!("{}", value["message"].as_str().unwrap_or_default());
                ExitCode::SUCCESS
            }
            Err(error) => fail(args, &error),
        };
    }
    let request = match args.request() {
        Ok(request) => request,
        Err(text) => return fail(args, &ApiError::new(ErrorCode::Invalid, text)),
    };
    if let Command::AssumeAlone { domain, yes: false } = &args.command
        && !confirmed(domain)
    {
        return fail(args, &ApiError::new(ErrorCode::Conflict, "nothing was done"));
    }
    match talk(args, request).await {
        Ok(code) => code,
        Err(error) => fail(args, &error),
    }
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

fn fail(args: &Args, error: &ApiError) -> ExitCode {
    if args.json {
        println!("{}", serde_json::json!({ "error": error }));
    } else {
        eprintln!("remus: {error}");
    }
    exit_code(error.code)
}

fn wanted(args: &Args) -> Option<&str> {
    match &args.command {
        Command::Status { domain } | Command::Events { domain, .. } => domain.as_deref(),
        _ => None,
    }
}

async fn talk(args: &Args, request: Request) -> Result<ExitCode, ApiError> {
    let foreground = match &request {
        Request::Protect { foreground: true, domain, .. } => Some(domain.clone()),
        _ => None,
    };
    let mut interrupted = std::pin::pin!(interruption(foreground.is_some()));
    let mut stopping = None;
    let mut call = Call::start(&args.socket(), request).await?;
    let bar = progress_bar(args);
    let mut unprotected = false;
    loop {
        let reply = tokio::select! {
            reply = call.next() => reply?,
            () = &mut interrupted, if stopping.is_none() => {
                // Kept until the end, which comes on the first connection.
                let domain = foreground.clone().unwrap_or_default();
                stopping = Some(Call::start(&args.socket(), Request::Unprotect { domain }).await?);
                continue;
            }
        };
        let Some(reply) = reply else { break };
        match reply {
            Reply::Error(error) => {
                bar.finish_and_clear();
                return Ok(fail(args, &error));
            }
            Reply::Result(value) => {
                bar.finish_and_clear();
                show_result(args, &value)?;
                return Ok(if foreground.is_some() && unprotected { ExitCode::from(8) } else { ExitCode::SUCCESS });
            }
            other if args.json => {
                if !matches!(&other, Reply::Event(e) if wanted(args).is_some_and(|d| d != e.domain.name)) {
                    println!("{}", serde_json::to_string(&other).unwrap_or_default());
                }
            }
            Reply::Event(event) => {
                unprotected |= event.kind == EventKind::Unprotected;
                if wanted(args).is_none_or(|d| d == event.domain.name) {
                    bar.suspend(|| println!("{}", render::event(&event)));
                }
            }
            Reply::Missed(count) => bar.suspend(|| println!("({count} events missed)")),
            Reply::Progress { pages, total, bytes } => {
                bar.set_length(total.max(pages));
                bar.set_position(pages);
                bar.set_message(format!("{} MiB sent", bytes >> 20));
            }
        }
    }
    Err(ApiError::new(ErrorCode::Failed, "remusd hung up before it had answered; see its log (journalctl -u remusd)"))
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

fn show_result(args: &Args, value: &serde_json::Value) -> Result<(), ApiError> {
    match &args.command {
        Command::Status { .. } => {
            let mut rows: Vec<StatusRow> = serde_json::from_value(value.clone())
                .map_err(|e| ApiError::new(ErrorCode::Failed, format!("status cannot be read: {e}")))?;
            if let Some(name) = wanted(args) {
                rows.retain(|row| row.domain == name || row.uuid.to_string() == name);
                if rows.is_empty() {
                    return Err(ApiError::new(
                        ErrorCode::NotFound,
                        format!("{name} is neither protected by nor backed up on this host"),
                    ));
                }
            }
            if args.json {
                println!("{}", serde_json::to_string(&rows).unwrap_or_default());
            } else {
                println!("{}", render::status(&rows));
            }
        }
        _ if args.json => println!("{}", serde_json::json!({ "result": value })),
        _ => {
            if let Some(text) = value.get("message").and_then(|v| v.as_str()) {
                println!("{text}");
            }
        }
    }
    Ok(())
}
