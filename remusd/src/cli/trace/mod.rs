//! `remus trace`: the newest epochs as a file for a trace viewer.

mod chrome;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::api::{ApiError, ErrorCode, Trace};

/// Options of `remus trace`.
#[derive(Debug, clap::Args)]
pub struct TraceArgs {
    /// Domain name, id or UUID.
    pub domain: String,
    /// So many of the newest epochs; the daemon keeps 64.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// Write to this file, and not to standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Prints the trace or writes it to the file that was named; then the answer is what was done.
pub(super) fn show(args: &TraceArgs, trace: &Trace) -> Result<Option<String>, ApiError> {
    let failed =
        |what: &str, error: &dyn std::fmt::Display| ApiError::new(ErrorCode::Failed, format!("{what}: {error}"));
    let text = serde_json::to_string(&chrome::document(trace)).map_err(|error| failed("the trace", &error))?;
    let Some(path) = &args.output else {
        println!("{text}");
        return Ok(None);
    };
    let shown = path.display().to_string();
    std::fs::write(path, text + "\n").map_err(|error| failed(&shown, &error))?;
    let (count, name) = (trace.epochs.len(), &trace.domain.name);
    let epochs = if count == 1 { "epoch" } else { "epochs" };
    Ok(Some(format!(
        "{count} {epochs} of {name} in {shown}: open it at https://ui.perfetto.dev or in chrome://tracing"
    )))
}
