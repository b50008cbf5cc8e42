//! The hazards' schedules that concern the protocol, each as a script (or a sweep of one over time), without random delays.
//!
//! Protection begins after a millisecond; the first armed epoch is acknowledged after some 50 ms, later ones every 15 ms.

use super::campaign::{Order, campaign};
use super::plan::{Fault, MS, Plan, What, When};
use super::world::World;
use crate::protect::machine::{GuestEnd, OnBackupLoss};
use crate::protect::options::OnPrimaryLoss;

pub(super) const LATER: u64 = 150 * MS;

pub(super) fn at(at: u64, what: What) -> Fault {
    Fault { when: When::At(at), what }
}

pub(super) fn plan(witness: bool, faults: &[Fault]) -> Plan {
    Plan { witness, faults: faults.to_vec(), calm_from: 900 * MS, ..Plan::quiet() }
}

/// Runs a plan that must break no rule.
pub(super) fn good(plan: &Plan) -> World {
    let mut world = World::new(plan);
    world.run();
    assert!(world.oracle.violation.is_none(), "{:?}\n{plan:#?}", world.oracle.violation);
    world
}

/// The same for both ways of deciding.
fn both(faults: &[Fault]) -> [World; 2] {
    [false, true].map(|witness| good(&plan(witness, faults)))
}

pub(super) fn started(world: &World) -> Vec<usize> {
    world.oracle.started.iter().map(|(copy, _)| world.copies[*copy].host).collect()
}

#[test]
fn nothing_happens_when_nothing_fails() {
    for world in both(&[]) {
        assert_eq!(started(&world), [0; 0]);
        assert!(world.tally().acked > 30 && world.tally().answers > 50, "{:?}", world.tally());
    }
}

#[test]
fn f1_the_death_of_the_backups_daemon_activates_nothing() {
    for time in [1, 50, 300] {
        for world in both(&[at(LATER, What::Kill(1, time * MS))]) {
            assert_eq!(started(&world), [0; 0]);
        }
    }
}

#[test]
fn f2_a_restarted_daemon_unseals_nothing_that_it_does_not_own() {
    for down in (0..600).step_by(20) {
        good(&plan(true, &[at(LATER, What::Kill(0, down * MS))]));
    }
    let world = good(&plan(true, &[at(LATER, What::Kill(0, 600 * MS))]));
    assert_eq!(started(&world), [1], "the backup took over");
    assert!(!world.copies[0].exists(), "and the old copy is gone");
    let unsafe_policy = plan(false, &[at(LATER, What::Kill(0, 600 * MS))]);
    good(&Plan { on_primary_loss: OnPrimaryLoss::Activate, ..unsafe_policy });
}

#[test]
fn f3_f4_a_host_that_comes_back_without_its_guest_leaves_the_only_copy_alone() {
    for time in [10, 100, 400] {
        for world in both(&[at(LATER, What::PowerLoss(0, time * MS))]) {
            assert_eq!(started(&world), [1]);
        }
    }
}

#[test]
fn f5_a_switchover_whose_confirmation_is_lost_has_one_owner() {
    for delay in (0..80).step_by(2) {
        for cut in [What::Cut(300 * MS), What::CutFrom(0, 300 * MS), What::CutFrom(1, 300 * MS), What::Reset] {
            both(&[at(LATER, What::Switchover), at(LATER + delay * MS, cut)]);
        }
    }
    for world in both(&[at(LATER, What::Switchover)]) {
        assert_eq!(started(&world), [1]);
    }
}

/// The confirmation is lost, and the guest boots anew where it is now: the copy that stands still is given up (seed 1337403).
#[test]
fn f5_a_switchover_whose_guest_boots_anew_has_one_owner() {
    for delay in 0..20 {
        let ends = at(LATER + 12 * MS + delay * MS, What::GuestEnds(GuestEnd::Watchdog));
        let faults = [at(LATER, What::Switchover), at(LATER + 8 * MS, What::Freeze(0, 100 * MS)), ends];
        for world in both(&[&faults[..], &[at(LATER + 35 * MS, What::Reset)]].concat()) {
            assert!(started(&world).len() <= 1, "{faults:?}");
        }
    }
}

#[test]
fn f6_a_winner_that_cannot_start_gives_the_guest_back() {
    let faults =
        [at(100 * MS, What::StartFails(1)), at(LATER, What::WitnessAway(0, 400 * MS)), at(LATER, What::Cut(400 * MS))];
    let world = good(&plan(true, &faults));
    assert_eq!(started(&world), [0; 0]);
    both(&[at(100 * MS, What::StartFails(1)), at(LATER, What::Switchover)]);
}

/// Bytes that were on their way since before the primary died are no life: the built copy was destroyed for them (seed 4955).
#[test]
fn f6_a_primary_that_is_heard_too_late_does_not_cost_the_only_copy() {
    for slow in (200..400).step_by(5) {
        let faults = [
            at(LATER, What::SlowReceiver(1, slow * MS)),
            at(LATER + 30 * MS, What::CutFrom(0, 280 * MS)),
            at(LATER + 80 * MS, What::PowerLoss(0, 200 * MS)),
        ];
        for world in both(&faults) {
            assert_eq!(started(&world), [1]);
        }
    }
}

/// A restarted primary's request to give the copy up is held up by a cut; when it arrives that host is dead (seed 1023117).
#[test]
fn f6_a_request_that_outlives_its_sender_does_not_cost_the_only_copy() {
    let mut hit = 0;
    for cut in (200..240).map(|tenth| LATER + 50 * MS + (tenth - 200) * MS / 10) {
        let faults = [
            at(LATER, What::Kill(0, 50 * MS)),
            at(cut, What::CutFrom(0, 120 * MS)),
            at(cut + 30 * MS, What::PowerLoss(0, 200 * MS)),
        ];
        let mut world = World::new(&plan(false, &faults));
        world.trace = Some(Vec::new());
        world.run();
        assert!(world.oracle.violation.is_none(), "{:?} {faults:?}", world.oracle.violation);
        let trace = world.trace.take().unwrap_or_default();
        let dead = trace.iter().position(|line| line.contains("copy 0 is gone"));
        if trace.iter().skip(dead.unwrap_or(trace.len())).any(|line| line.contains("Challenge")) {
            hit += 1;
            assert_eq!(started(&world), [1], "{faults:?}");
        }
    }
    assert!(hit > 0, "the request was never on its way when its sender died");
}

#[test]
fn f7_a_witness_that_was_wiped_or_rolled_back_lets_nobody_claim() {
    for spoil in [What::WitnessWipe, What::WitnessRollback] {
        for delay in (0..400).step_by(20) {
            good(&plan(true, &[at(LATER, spoil), at(LATER + delay * MS, What::Cut(300 * MS))]));
            good(&plan(true, &[at(LATER, What::Cut(500 * MS)), at(LATER + delay * MS, spoil)]));
        }
    }
    let alone_then_forgotten = [
        at(20 * MS, What::WitnessBackup),
        at(LATER, What::Stall(1, 500 * MS)),
        at(LATER + 350 * MS, What::WitnessRollback),
    ];
    good(&plan(true, &alone_then_forgotten));
}

#[test]
fn f8_lost_replies_and_late_claims_leave_one_owner() {
    for delay in (0..200).step_by(10) {
        for fault in [What::WitnessLoses(1), What::WitnessLoses(3), What::WitnessSlow(100 * MS, 300 * MS)] {
            good(&plan(true, &[at(LATER, What::Cut(300 * MS)), at(LATER + delay * MS, fault)]));
            good(&plan(true, &[at(LATER, What::PowerLoss(0, 400 * MS)), at(LATER + delay * MS, fault)]));
        }
    }
}

#[test]
fn f9_nothing_is_acknowledged_once_an_activation_has_begun() {
    for length in (90..330).step_by(5) {
        both(&[at(LATER, What::Stall(0, length * MS))]);
        both(&[at(LATER, What::CutFrom(0, length * MS))]);
    }
}

#[test]
fn f10_the_first_copy_cannot_be_activated() {
    for when in 0..70 {
        both(&[at(when * MS, What::PowerLoss(0, 200 * MS))]);
        let policy = plan(false, &[at(when * MS, What::PowerLoss(0, 200 * MS))]);
        good(&Plan { on_primary_loss: OnPrimaryLoss::Activate, ..policy });
    }
}

#[test]
fn f11_a_dead_receiver_ends_protection_and_not_the_guest() {
    for world in both(&[at(LATER, What::KillReceiver(1))]) {
        assert_eq!(started(&world), [0; 0]);
    }
    for delay in 0..20 {
        both(&[at(LATER, What::KillReceiver(1)), at(LATER + delay * MS, What::PowerLoss(0, 100 * MS))]);
    }
}

#[test]
fn f14_a_reset_of_the_queue_lets_nothing_through() {
    for when in 0..40 {
        both(&[at(LATER + when * 500, What::PlugReset(0)), at(LATER + 60 * MS, What::PowerLoss(0, 100 * MS))]);
    }
}

#[test]
fn f18_a_damaged_epoch_is_never_applied() {
    both(&[at(LATER, What::Damage(1)), at(LATER + 100 * MS, What::PowerLoss(0, 200 * MS))]);
    for delay in 0..30 {
        both(&[at(LATER, What::Damage(1)), at(LATER + delay * MS, What::PowerLoss(0, 200 * MS))]);
    }
}

#[test]
fn f19_without_a_witness_the_token_is_the_primarys() {
    for fault in [What::PowerLoss(1, 400 * MS), What::Cut(400 * MS), What::Kill(1, 400 * MS)] {
        let world = good(&plan(false, &[at(LATER, fault)]));
        assert_eq!(started(&world), [0; 0]);
        // A witness that goes first is agreed upon; one that goes with the backup is waited for.
        good(&plan(true, &[at(LATER, What::WitnessDown(700 * MS)), at(LATER + 200 * MS, fault)]));
        good(&plan(true, &[at(LATER, What::WitnessDown(700 * MS)), at(LATER, fault)]));
        let hold = plan(false, &[at(LATER, fault)]);
        good(&Plan { on_backup_loss: OnBackupLoss::Hold, ..hold });
    }
}

#[test]
fn f19_the_mode_changes_while_the_other_side_is_lost() {
    for delay in (0..300).step_by(10) {
        good(&plan(true, &[at(LATER, What::WitnessDown(150 * MS)), at(LATER + delay * MS, What::Cut(300 * MS))]));
        good(&plan(
            true,
            &[at(LATER, What::WitnessDown(150 * MS)), at(LATER + delay * MS, What::CutFrom(1, 300 * MS))],
        ));
    }
}

#[test]
fn f21_a_slow_receiver_bounds_what_is_acknowledged() {
    for time in [20, 100, 400] {
        both(&[at(LATER, What::SlowReceiver(1, time * MS))]);
    }
}

#[test]
fn f22_gray_failures_have_one_outcome() {
    for time in (50..500).step_by(25) {
        for fault in [What::Stall(1, time * MS), What::Freeze(1, time * MS), What::CutFrom(1, time * MS)] {
            both(&[at(LATER, fault)]);
        }
        let cut_from_the_lan = [at(LATER, What::CutLan(1, time * MS)), at(LATER, What::Cut(time * MS))];
        both(&cut_from_the_lan);
    }
}

#[test]
fn f23_the_guest_is_not_left_standing() {
    for time in [30, 100, 500] {
        both(&[at(LATER, What::GuestHangs(time * MS))]);
        for delay in 0..10 {
            both(&[at(LATER, What::GuestHangs(time * MS)), at(LATER + delay * 2 * MS, What::Kill(0, 20 * MS))]);
        }
    }
    for when in 0..40 {
        both(&[at(LATER + when * 400, What::Stall(0, 300 * MS))]);
        both(&[at(LATER + when * 400, What::EngineFails(0))]);
        both(&[at(LATER + when * 400, What::DeviceFails(0))]);
    }
}

#[test]
fn f24_a_guest_that_has_ended_is_not_resurrected() {
    for end in [GuestEnd::Poweroff, GuestEnd::Reboot, GuestEnd::Crash] {
        both(&[at(LATER, What::GuestEnds(end))]);
        for delay in 0..12 {
            both(&[at(LATER, What::GuestEnds(end)), at(LATER + delay * MS / 2, What::PowerLoss(0, 100 * MS))]);
            both(&[at(LATER, What::GuestEnds(end)), at(LATER + delay * MS / 2, What::Cut(400 * MS))]);
        }
    }
}

#[test]
fn f25_a_thawed_host_does_not_answer_for_the_guest() {
    for time in (50..700).step_by(25) {
        both(&[at(LATER, What::Freeze(0, time * MS))]);
        both(&[at(LATER, What::Stall(0, time * MS))]);
    }
}

/// The daemon, or its host, dies just before each of its steps.
#[test]
fn every_step_may_be_the_last() {
    for host in 0..2 {
        for step in 1..180 {
            for what in [What::Kill(host, 30 * MS), What::Kill(host, 400 * MS), What::PowerLoss(host, 150 * MS)] {
                both(&[Fault { when: When::Step(host, step), what }]);
            }
        }
    }
}

/// The same while a switchover is under way, and while the link is cut.
#[test]
fn every_step_of_an_ending_may_be_the_last() {
    for host in 0..2 {
        for step in 0..60 {
            let step = if host == 0 { 90 + step } else { 20 + step };
            for begin in [What::Switchover, What::Cut(300 * MS), What::Stop] {
                let last = Fault { when: When::Step(host, step), what: What::Kill(host, 100 * MS) };
                both(&[at(100 * MS, begin), last]);
            }
        }
    }
}

#[test]
fn some_thousand_seeds_break_no_rule() {
    let order = Order { start: 0, seeds: 2000, jobs: 2, coverage: true, without: None };
    let summary = campaign(order, &|_| {});
    assert!(summary.violation.is_none(), "{:?}", summary.violation);
    assert!(summary.tally.started > 100, "{:?}", summary.tally);
    for met in [("primary", "Yielding"), ("primary", "HandedOver"), ("backup", "Forfeiting"), ("backup", "Confirming")]
    {
        assert!(summary.coverage.keys().any(|(machine, state, _)| (*machine, state.as_str()) == met), "{met:?}");
    }
    assert_eq!(super::disk::cases::missed(&summary.coverage), [""; 0], "cases of the disk that no seed has reached");
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    let run = |seed| {
        let mut world = World::new(&Plan::of(seed));
        world.trace = Some(Vec::new());
        world.run();
        world.trace
    };
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
}
