//! The `remus` command line: `args` says what can be typed, `run` talks to the daemon, `render` shows the answer, `top` goes on showing it.
//! `pair` pairs hosts, `doctor` looks at them, `disk` is for mirrored disks, `enable` for policies, `trace` draws epochs, `manual` makes man pages, `daemon` is `remusd`'s own command line.

pub mod args;
pub mod daemon;
pub mod disk;
mod doctor;
pub mod enable;
pub mod manual;
pub mod pair;
pub mod protect;
pub mod render;
pub mod run;
mod top;
pub mod trace;

pub use args::Args;
pub use run::run;
