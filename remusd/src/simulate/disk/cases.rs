//! The hazards' schedules that concern the guest's disk, as scripts; `simulate/cases` has the others.

use crate::protect::machine::GuestEnd;
use crate::simulate::cases::{LATER, at, good, plan, started};
use crate::simulate::coverage::Coverage;
use crate::simulate::plan::{Fault, MS, Plan, What, When};
use crate::simulate::world::World;

fn with_disk(witness: bool, faults: &[Fault]) -> Plan {
    Plan { disk: true, ..plan(witness, faults) }
}

/// The same for both ways of deciding.
fn both(faults: &[Fault]) -> [World; 2] {
    [false, true].map(|witness| good(&with_disk(witness, faults)))
}

#[test]
fn nothing_happens_to_a_disk_when_nothing_fails() {
    for world in both(&[]) {
        assert_eq!(started(&world), [0; 0]);
        assert!(world.tally().acked > 30 && world.tally().answers > 50, "{:?}", world.tally());
        let disks = world.disks.as_ref().unwrap();
        assert!(disks.sides[0].is_open() && !disks.sides[1].is_open());
        assert!(disks.tags > 200 && disks.told.iter().any(|tag| *tag > 100), "the guest has written and said so");
        assert_eq!(disks.sides[0].storage.now, disks.sides[1].storage.now);
    }
}

#[test]
fn r5_the_disk_is_the_activated_epochs_whenever_the_primary_dies() {
    for after in 0..60 {
        for world in both(&[at(LATER + after * 500, What::PowerLoss(0, 200 * MS))]) {
            assert_eq!(started(&world), [1]);
            assert!(world.disks.as_ref().unwrap().sides[1].is_open());
        }
    }
    for world in both(&[at(LATER, What::Switchover)]) {
        assert_eq!(started(&world), [1]);
    }
}

#[test]
fn r4_a_disk_whose_first_synchronisation_is_unfinished_is_not_activated() {
    for after in 0..60 {
        both(&[at(10 * MS + after * 500, What::PowerLoss(0, 200 * MS))]);
        both(&[at(10 * MS, What::SlowDisk(1, 200 * MS)), at(10 * MS + after * 4 * MS, What::PowerLoss(0, 200 * MS))]);
    }
}

#[test]
fn f15_a_copy_that_dies_while_it_writes_is_brought_up_to_date() {
    for after in 0..40 {
        both(&[at(LATER + after * 500, What::PowerLoss(1, 50 * MS))]);
        both(&[at(LATER + after * 500, What::KillDisk(1, 20 * MS))]);
        let slow = at(LATER, What::SlowDisk(1, 30 * MS));
        both(&[slow, at(LATER + after * MS, What::PowerLoss(1, 50 * MS))]);
    }
}

#[test]
fn f16_what_a_lost_primary_wrote_alone_is_undone_at_its_return() {
    for after in 0..40 {
        // Its disk has no copy, its daemons have each other; then it dies, and the copy of the last epoch goes on.
        let alone = at(LATER, What::CutDisk(0, 100 * MS));
        both(&[alone, at(LATER + after * MS, What::PowerLoss(0, 100 * MS))]);
        let cut = at(LATER, What::Cut(300 * MS));
        both(&[cut, at(LATER + after * 5 * MS, What::PowerLoss(0, 50 * MS))]);
    }
}

#[test]
fn f20_the_death_of_a_disks_service_costs_no_request() {
    for host in 0..2 {
        for time in [1, 30, 200] {
            for after in 0..20 {
                for world in both(&[at(LATER + after * MS, What::KillDisk(host, time * MS))]) {
                    assert_eq!(started(&world), [0; 0]);
                }
            }
        }
    }
}

#[test]
fn f24_a_guest_that_boots_anew_has_its_disk() {
    for after in 0..20 {
        both(&[at(LATER + after * MS, What::GuestEnds(GuestEnd::Reboot))]);
        both(&[at(LATER, What::KillDisk(0, 30 * MS)), at(LATER + after * 2 * MS, What::GuestEnds(GuestEnd::Reboot))]);
    }
}

/// The copy is given up while its disk is still being activated: the disk must not be opened for nobody.
#[test]
fn r9_an_activation_that_is_overtaken_leaves_no_open_disk() {
    for after in (180..420).step_by(6) {
        let faults = [
            at(LATER, What::Cut(500 * MS)),
            at(LATER, What::WitnessAway(0, 450 * MS)),
            at(LATER + 100 * MS, What::SlowDisk(1, 400 * MS)),
            at(LATER + after * MS, What::KillReceiver(1)),
        ];
        let world = good(&with_disk(true, &faults));
        assert_eq!(started(&world), [0; 0]);
    }
}

/// The daemon, or its host, dies just before each of its steps.
#[test]
fn every_step_with_a_disk_may_be_the_last() {
    for host in 0..2 {
        for step in (1..180).step_by(2) {
            for what in [What::Kill(host, 30 * MS), What::Kill(host, 400 * MS), What::PowerLoss(host, 150 * MS)] {
                both(&[Fault { when: When::Step(host, step), what }]);
            }
        }
    }
}

/// The cases that random plans must have reached.
pub(in crate::simulate) fn missed(coverage: &Coverage) -> Vec<&'static str> {
    const CASES: &[&str] = &[
        "a copy does not keep up",
        "a copy dies while it applies",
        "a disk cannot be activated",
        "a disk cannot be given free",
        "a disk is activated",
        "a loser's disk is given free",
        "a service is restarted under its guest",
        "a source is refused",
        "an activation that came to nothing is taken back",
        "an early checkpoint is asked for",
        "an epoch's memory comes after its disk",
        "an epoch's memory comes before its disk",
        "everything is compared",
        "nothing is to be synchronised",
        "power is lost with writes in the cache",
        "the copies are alike",
        "the copy's service is killed, armed",
        "the source's service is killed, armed",
        "what the copy wrote as a source is synchronised",
        "what the source wrote is synchronised",
    ];
    let met = |case: &str| coverage.keys().any(|(machine, what, _)| *machine == "disk" && what == case);
    CASES.iter().copied().filter(|case| !met(case)).collect()
}
