//! Runs the production state machines under a seeded deterministic scheduler and holds every step against the safety rules.
//!
//! Real are the machines of primary, backup and recovery, the link's codec and detectors, and the plug's counting. Simulated is what is
//! around them: `world` keeps time, `net` carries bytes, `guest` are the copies and the client, `primary`, `backup`, `recover` and `daemon`
//! do what the drivers do with the machines' actions, `plan` says what fails, `oracle` knows the rules. docs/reliability.md has the rest.

mod backup;
pub mod campaign;
pub mod coverage;
mod daemon;
mod disk;
mod guest;
mod history;
mod link;
pub mod mutants;
mod net;
mod operator;
mod oracle;
mod plan;
mod primary;
mod receiver;
mod recover;
mod rng;
pub mod shrink;
mod witness;
mod world;

pub use oracle::{Rule, Violation};
pub use plan::{Fault, Micros, Plan, What, When};
pub use world::World;

use plan::MS;

/// From the release of one epoch to the suspend of the next.
const INTERVAL: Micros = 12 * MS;
/// Silence after which a peer is suspected.
const DETECTION: Micros = 100 * MS;
/// How long an acknowledgement may take.
const ACK_DEADLINE: Micros = 250 * MS;
/// How long a guest may take to suspend.
const SUSPEND_DEADLINE: Micros = 60 * MS;
/// How long a guest may stand still.
const PAUSE_DEADLINE: Micros = 80 * MS;
/// How long the backup may take to confirm a stop.
const STOP_DEADLINE: Micros = 200 * MS;
/// How long the backup may take to run what it was handed.
const HANDOVER_DEADLINE: Micros = 400 * MS;
/// Epochs that the receiver may be behind.
const BACKLOG_EPOCHS: usize = 1;

#[cfg(test)]
mod cases;

/// Runs a plan to its end.
#[must_use]
pub fn run(plan: &Plan) -> World {
    let mut world = World::new(plan);
    world.run();
    world
}
