//! The `remus` command line: `args` says what can be typed, `pair` pairs hosts, `run` talks to the daemon, `render` shows the answer.

pub mod args;
pub mod pair;
pub mod render;
pub mod run;

pub use args::Args;
pub use run::run;
