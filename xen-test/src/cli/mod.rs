//! The command line of `xen-test`.

mod bench;
mod demo;
mod interrupt;
mod remote;
mod run;
mod shell;
mod soak;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Nested Xen hosts for tests.
#[derive(Debug, Parser)]
#[command(name = "xen-test", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot hosts and leave them running until Ctrl-C or `down`
    Up(up::UpArgs),
    /// End a run that `up` started
    Down {
        /// Name of the run
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Run a bash command line in a dom0; its output and exit code are passed on
    Exec {
        /// Name of the run
        #[arg(long, default_value = "default")]
        name: String,
        /// a or b
        host: String,
        /// The command line; several words are joined with spaces
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy files or directories into a dom0
    Push {
        /// Name of the run
        #[arg(long, default_value = "default")]
        name: String,
        /// a or b
        host: String,
        /// FILE.. DEST
        #[arg(required = true, num_args = 2..)]
        files: Vec<PathBuf>,
    },
    /// Cut links, power off, freeze ... in a run that `up` started
    #[command(after_help = crate::control::HELP)]
    Fault {
        /// Name of the run
        #[arg(long, default_value = "default")]
        name: String,
        /// What to do, see below
        #[arg(required = true, trailing_var_arg = true)]
        action: Vec<String>,
    },
    /// Run a command in the network namespace of a run, where the client lives
    Client {
        /// Name of the run
        #[arg(long, default_value = "default")]
        name: String,
        /// Program and arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// List the scenarios
    List,
    /// Run scenarios on freshly booted hosts
    Run {
        /// Names, or how names start
        #[arg(required = true)]
        scenarios: Vec<String>,
        /// Do not build and install remusd: for scenarios of the harness and the guest alone
        #[arg(long)]
        without_project: bool,
        /// Begin no scenario after so many minutes; the rest is skipped, and counted as that
        #[arg(long, value_name = "MINUTES")]
        within: Option<u64>,
    },
    /// Show the main job: protect a guest, power its host off, watch it go on
    Demo(demo::DemoArgs),
    /// Measure checkpoints against stock `xl remus`
    Bench(bench::BenchArgs),
    /// Break something every few seconds under client load, for as long as asked
    Soak(soak::SoakArgs),
    /// Boot hosts and give a prompt in them
    Shell(up::UpArgs),
    /// Build the dom0 image if the cache lacks it
    Images,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Up(args) => up::up(&args).map(|()| ExitCode::SUCCESS),
        Command::Down { name } => remote::down(&name).map(|()| ExitCode::SUCCESS),
        Command::Exec { name, host, command } => remote::exec(&name, &host, &command.join(" ")),
        Command::Push { name, host, files } => remote::push(&name, &host, &files).map(|()| ExitCode::SUCCESS),
        Command::Fault { name, action } => remote::fault(&name, &action.join(" ")).map(|()| ExitCode::SUCCESS),
        Command::Client { name, command } => Err(remote::client(&name, &command)),
        Command::List => {
            for scenario in crate::scenario::SCENARIOS {
                println!("{:<28} {}", scenario.name, scenario.about);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { scenarios, without_project, within } => {
            run::run(&scenarios, !without_project, within.map(|minutes| Duration::from_secs(60 * minutes)))
        }
        Command::Demo(args) => demo::demo(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Soak(args) => soak::soak(&args).map(|()| ExitCode::SUCCESS),
        Command::Shell(args) => shell::shell(&args).map(|()| ExitCode::SUCCESS),
        Command::Images => images().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xen-test: {error:#}");
        ExitCode::FAILURE
    })
}

fn images() -> Result<()> {
    let image = crate::image::ensure()?;
    println!("{}", image.root_disk().parent().unwrap_or(&image.root_disk()).display());
    Ok(())
}
