//! The `remus` command line: `args` says what can be typed, `run` talks to the daemon, `render` shows the answer, `top` goes on showing it.
//! `pair` pairs hosts, `doctor` looks at them, `disk` is for mirrored disks.

pub mod args;
pub mod disk;
mod doctor;
pub mod pair;
pub mod protect;
pub mod render;
pub mod run;
mod top;

pub use args::Args;
pub use run::run;
