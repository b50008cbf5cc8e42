//! The `remus` command line: `args` says what can be typed, `run` talks to the daemon, `render` shows the answer, `top` goes on showing it.
//! `pair` pairs hosts, `doctor` looks at them.

pub mod args;
mod doctor;
pub mod pair;
pub mod protect;
pub mod render;
pub mod run;
mod top;

pub use args::Args;
pub use run::run;
