//! Network buffering: what a guest sends in an armed epoch is held until the epoch is acknowledged.
mod plug_model;
mod plug_state;
pub use plug_model::{PlugModel, PlugOp};
pub use plug_state::{OutOfTurn, Outcome, Phase, PlugState};
