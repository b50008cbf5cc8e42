//! `remus`: the command line of remusd.

use std::process::ExitCode;

use clap::Parser;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    remusd::cli::run(&remusd::cli::Args::parse()).await
}
