//! A guest under client load while something breaks every few seconds, for as long as asked, and a checker of what the client saw.

mod fault;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use remusd::api::Role;

pub use fault::{Dice, Fault, other};

use crate::net::Party;
use crate::pair::Pair;
use crate::progress;
use crate::protection::{Arena, PATIENCE, protect, row};
use crate::wait::wait_until;
use crate::witness::Etcd;

/// How a soak went.
#[derive(Debug, Default, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// Faults brought about.
    pub faults: u64,
    /// How often the guest went on at the other host.
    pub moves: u64,
    /// How often protection had to be begun anew.
    pub protections: u64,
    /// Lines that the client has had over its one connection.
    pub lines: u64,
}

/// Breaks things for `time`. The order of faults is the seed's; what becomes of them is the machines'.
///
/// # Errors
/// The first thing that must not be: a value lost or repeated, the connection broken, a guest that speaks from two hosts, nobody who
/// runs it, or a protection that does not come back.
pub fn soak(pair: &Pair, time: Duration, seed: u64) -> Result<Tally> {
    let mut dice = Dice::new(seed);
    let mut arena = Arena::start(pair, "")?;
    let mut primary = Party::A;
    let mut tally = Tally { protections: 1, ..Tally::default() };
    let start = Instant::now();
    while start.elapsed() < time {
        std::thread::sleep(Duration::from_millis(dice.below(4000)));
        let (fault, length) = dice.fault(primary);
        tally.faults += 1;
        progress!(
            "soak {:4.0} s, fault {}: {fault} for {:.1} s",
            start.elapsed().as_secs_f32(),
            tally.faults,
            length.as_secs_f32()
        );
        let nth = tally.faults;
        let what = || format!("seed {seed}, fault {nth}: {fault} for {} ms", length.as_millis());
        fault.begin(&mut arena).with_context(what)?;
        std::thread::sleep(length);
        fault.end(&mut arena).with_context(what)?;
        let now = settle(&mut arena, primary, &mut tally).with_context(what)?;
        if now != primary {
            progress!("soak: the guest runs on host {}", now.name());
            tally.moves += 1;
            primary = now;
        }
        let turns = arena.turns()?.len() as u64;
        ensure!(turns == tally.moves + 1, "{}: it has moved {} times but spoken in {turns} turns", what(), tally.moves);
    }
    tally.lines = arena.protected.client.arrivals().len() as u64;
    Ok(tally)
}

/// Waits until the guest is heard and protected again, and says where it runs.
fn settle(arena: &mut Arena<'_>, before: Party, tally: &mut Tally) -> Result<Party> {
    let runs_on = wait_until(PATIENCE, "one host runs the guest", || {
        for host in [before, other(before)] {
            if let Some(row) = row(arena.host(host), "guest", Role::Primary)?
                && row.protected
            {
                return Ok(Some(host));
            }
        }
        let record = arena.record()?;
        let settled =
            matches!(record.state, remusd::witness::RecordState::Active | remusd::witness::RecordState::Stopped);
        Ok(settled.then_some(if record.owner.name == "hosta" { Party::A } else { Party::B }))
    })?;
    arena.protected.goes_on()?;
    let protected = row(arena.host(runs_on), "guest", Role::Primary)?.is_some_and(|row| row.protected);
    if !protected {
        // The other host may still be putting its copy away.
        wait_until(PATIENCE, "the guest is protected again", || {
            let again = protect(arena.host(runs_on), "guest", &format!("--witness {}", Etcd::url()));
            Ok(again.inspect_err(|error| progress!("soak: not yet: {error:#}")).ok())
        })?;
        tally.protections += 1;
    }
    Ok(runs_on)
}
