//! Scenarios: what is tried on nested hosts, and the runner.

mod api_programs;
mod api_story;
mod disk_database;
mod disk_drbd;
mod disk_kills;
mod disk_move;
mod disk_planned_stop;
mod disk_power_loss;
mod disk_resync;
mod disk_script;
mod harness_end;
mod harness_self;
mod main_backup_loss;
mod main_guest_ends;
mod main_interop;
mod main_kills;
mod main_netbuffer_kernel;
mod main_output_commit;
mod main_planned_stop;
mod main_power_loss;
mod main_primary_frozen;
mod main_refusals;
mod main_two_guests;
mod main_xl_remus;
mod report;
mod runner;
mod safety_drill;
mod safety_frozen;
mod safety_lost_host;
mod safety_paired;
mod safety_partitions;
mod safety_soak;
mod safety_switchover;
mod safety_vif_gate;
mod safety_witness;
mod speed_interval;
mod speed_native;

use std::path::Path;

use anyhow::{Result, bail};

pub use runner::run;

use crate::host::Snapshot;
use crate::pair::Pair;

/// One thing to try on a freshly reset pair of hosts.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Unique name; its first word is the group, such as `main-`.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// How many hosts it needs: 1 or 2.
    pub hosts: usize,
    /// What is there when it begins.
    pub start: Snapshot,
    /// The scenario itself. An error is a failure, [`skip`] makes one that is not.
    pub run: fn(&mut Ctx<'_>) -> Result<()>,
}

/// All scenarios, in the order in which they run. When time is short the last ones are left out: they are long, and most of what they
/// touch others have touched before.
pub const SCENARIOS: &[Scenario] = &[
    harness_self::SELF,
    harness_end::END,
    main_power_loss::PVH,
    main_power_loss::HVM,
    speed_native::POWER_LOSS,
    main_netbuffer_kernel::KERNEL,
    main_output_commit::COMMIT,
    main_planned_stop::STOP,
    main_backup_loss::POWER,
    main_backup_loss::FROZEN,
    main_backup_loss::HOLD,
    main_primary_frozen::FROZEN,
    main_guest_ends::POWEROFF,
    main_guest_ends::REBOOT,
    main_guest_ends::CRASH,
    main_kills::PRIMARY,
    main_kills::BACKUP,
    main_interop::TO_STOCK,
    main_xl_remus::XL_REMUS,
    main_refusals::REFUSALS,
    disk_power_loss::LOSS,
    disk_database::DATABASE,
    disk_drbd::DRBD,
    safety_partitions::HOSTS,
    safety_partitions::PRIMARY,
    safety_partitions::BACKUP,
    api_story::STORY,
    safety_witness::DOWN,
    safety_witness::BACK,
    safety_witness::WIPED,
    safety_witness::LOST_BOTH,
    safety_frozen::BOTH,
    safety_switchover::ALONE,
    safety_paired::PAIRED,
    safety_lost_host::RETURNS,
    safety_drill::DRILL,
    api_programs::PROGRAMS,
    speed_native::TO_STOCK,
    speed_native::COMPARE,
    speed_native::BLACKHOLE,
    speed_native::OVER_BUDGET,
    speed_native::GONE,
    speed_native::BALLOON,
    speed_interval::AUTO,
    main_kills::PARTS,
    main_interop::FROM_STOCK,
    main_two_guests::TWO,
    safety_switchover::WITNESS,
    safety_vif_gate::GATE,
    disk_planned_stop::STOP,
    disk_resync::RESYNC,
    disk_resync::BACK,
    disk_script::SCRIPT,
    disk_kills::DAEMON,
    disk_kills::SERVICE,
    disk_kills::COPY,
    disk_move::MOVE,
    speed_native::COMPARE_HVM,
    speed_native::POWER_LOSS_HVM,
    safety_soak::SOAK,
];

/// Scenarios that are written but that no run has shown to pass yet: skipped, and counted as such, unless `XEN_TEST_UNSHOWN` is set.
/// A name leaves this list with the run that shows it.
pub const UNSHOWN: &[&str] = &[];

/// What a scenario works with.
#[derive(Debug)]
pub struct Ctx<'p> {
    pair: &'p Pair,
    name: &'static str,
    logs: &'p Path,
}

impl<'p> Ctx<'p> {
    /// The hosts, links and client namespace.
    pub fn pair(&self) -> &'p Pair {
        self.pair
    }

    /// A directory for files of this scenario (captures, figures). It stays.
    pub fn logs(&self) -> &'p Path {
        self.logs
    }

    /// One line of progress.
    pub fn note(&self, line: &str) {
        crate::progress!("{}: {line}", self.name);
    }
}

/// Why a scenario was not run to its end, without having failed.
#[derive(Debug, thiserror::Error)]
#[error("skipped: {0}")]
pub struct Skip(pub String);

/// Ends a scenario as skipped: `return skip("no such hardware")`.
pub fn skip(reason: impl Into<String>) -> Result<()> {
    Err(Skip(reason.into()).into())
}

/// The scenarios whose name is, or starts with, one of `patterns`; in order, each once.
///
/// # Errors
/// A pattern matches nothing.
pub fn select(patterns: &[String]) -> Result<Vec<Scenario>> {
    for pattern in patterns {
        if !SCENARIOS.iter().any(|scenario| scenario.name.starts_with(pattern.as_str())) {
            bail!("no scenario is called '{pattern}' or starts so: see `xen-test list`");
        }
    }
    let wanted = |scenario: &&Scenario| patterns.iter().any(|pattern| scenario.name.starts_with(pattern.as_str()));
    Ok(SCENARIOS.iter().filter(wanted).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_grouped() {
        let mut names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
        const GROUPS: [&str; 6] = ["main", "safety", "api", "disk", "speed", "install"];
        for scenario in SCENARIOS {
            let group = scenario.name.split('-').next().unwrap();
            assert!(GROUPS.contains(&group), "{}", scenario.name);
            assert!(matches!(scenario.hosts, 1 | 2), "{}", scenario.name);
        }
    }

    #[test]
    fn the_unshown_are_scenarios() {
        for name in UNSHOWN {
            assert!(SCENARIOS.iter().any(|scenario| scenario.name == *name), "{name}");
        }
    }

    #[test]
    fn a_prefix_selects_and_an_unknown_one_is_an_error() {
        assert!(select(&["main-harness".into()]).unwrap().len() == 2);
        assert!(select(&["main-harness-self".into(), "main-".into()]).is_ok());
        assert!(select(&["nosuch".into()]).is_err());
    }
}
