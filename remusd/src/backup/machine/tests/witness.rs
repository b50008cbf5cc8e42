//! Schedules with a witness, and switchovers.

use super::*;

fn armed() -> Machine {
    machine_in(State::Armed, policy(true, OnPrimaryLoss::Wait))
}

fn has(actions: &Actions, wanted: &Action) -> bool {
    actions.contains(wanted)
}

fn builds(actions: &Actions) -> bool {
    actions.iter().any(|a| matches!(a, Action::FinishCopy { .. }))
}

/// F22, F6, F5: detection, one more interval, a place to run; then build, claim, look again, go.
#[test]
fn a_lost_primary_is_replaced_step_by_step() {
    let mut machine = armed();
    assert!(has(&machine.step(Event::PrimarySuspect), &Action::StartGrace));
    assert!(!has(&machine.step(Event::PrimarySuspect), &Action::StartGrace), "one interval at a time");
    assert_eq!(machine.state(), State::Armed, "nothing is burnt yet");
    assert_eq!(machine.step(Event::GraceOver), [Action::CheckLan]);
    assert!(builds(&machine.step(Event::LanUp)));
    assert_eq!(machine.step(Event::CopyReady), [Action::Claim(key())], "built before it is claimed");
    assert_eq!(machine.step(Event::ClaimUnknown), [Action::Report(Report::WitnessSilent)]);
    assert_eq!(machine.step(Event::ClaimWon(key())), [Action::ConfirmClaim(key())]);
    assert_eq!(machine.step(Event::StillMine), [Action::Go]);
    let actions = machine.step(Event::CopyRuns);
    assert!(has(&actions, &Action::Activate(key())));
    assert!(matches!(actions[0], Action::Send(Frame::Superseded { .. })));
}

#[test]
fn a_primary_that_is_heard_again_costs_nothing_before_the_copy_is_built() {
    let mut machine = armed();
    machine.step(Event::PrimarySuspect);
    machine.step(Event::PrimaryAlive);
    assert_eq!(machine.step(Event::GraceOver), []);
    assert!(has(&machine.step(Event::PrimarySuspect), &Action::StartGrace));

    run(&mut machine, [Event::GraceOver, Event::LanUp, Event::PrimaryAlive]);
    let actions = machine.step(Event::CopyReady);
    assert!(!actions.iter().any(|a| matches!(a, Action::Claim(_))));
    assert!(has(&actions, &Action::WatchRecord(key())), "a built copy takes no more epochs");
    assert!(actions.iter().any(|a| matches!(a, Action::Send(Frame::BackupLost { .. }))));
    assert!(has(&machine.step(Event::RecordActive("a".into())), &Action::DestroyCopy), "the primary goes on");
}

/// F6, found by the simulator: what was heard had been on its way since before the primary died.
#[test]
fn a_primary_that_was_heard_only_once_more_does_not_cost_the_copy() {
    let mut machine = armed();
    run(&mut machine, [Event::PrimarySuspect, Event::GraceOver, Event::LanUp, Event::PrimaryAlive]);
    let actions = run(&mut machine, [Event::CopyReady, Event::LinkClosed("reset".into())]);
    assert!(!has(&actions, &Action::DestroyCopy));
    assert_eq!(machine.step(Event::PrimarySuspect), [Action::Claim(key())]);
    assert_eq!(machine.step(Event::PrimarySuspect), [], "once");
}

#[test]
fn a_copy_that_nobody_could_reach_abstains_until_that_changes() {
    let mut machine = armed();
    run(&mut machine, [Event::PrimarySuspect, Event::GraceOver]);
    let actions = machine.step(Event::LanDown("xenbr0".into()));
    assert_eq!(actions, [Action::Report(Report::Abstaining("xenbr0".into())), Action::StartGrace]);
    assert_eq!(machine.step(Event::GraceOver), [Action::CheckLan]);
    assert!(builds(&machine.step(Event::LanUp)));
}

/// F19: a claim is given up at once, gained only when it is on disk, and acknowledged only then.
#[test]
fn the_agreed_mode_is_durable_before_it_is_acknowledged() {
    let mut machine = armed();
    machine.step(Event::Frame(Frame::Token { seq: 2, token: Token::Primary }));
    assert_eq!(machine.token(), Token::Primary);
    let actions = machine.step(Event::PrimarySuspect);
    assert!(!has(&actions, &Action::StartGrace), "it will not claim");
    machine.step(Event::PrimaryAlive);
    assert!(matches!(machine.step(Event::TokenUnsaved("full".into()))[..], [Action::Report(_)]), "no acknowledgement");

    let newer = RecordKey { generation: Generation(6), ..key() };
    machine.step(Event::Frame(Frame::Token { seq: 3, token: Token::Witness(newer) }));
    assert_eq!(machine.token(), Token::Primary);
    assert_eq!(machine.step(Event::TokenSaved { seq: 2 }), [], "an older one's");
    let actions = machine.step(Event::TokenSaved { seq: 3 });
    assert!(has(&actions, &Action::Send(Frame::TokenAck { seq: 3 })));
    assert_eq!(machine.token(), Token::Witness(newer));
    run(&mut machine, [Event::PrimarySuspect, Event::GraceOver, Event::LanUp]);
    assert_eq!(machine.step(Event::CopyReady), [Action::Claim(newer)], "exactly what was armed");
}

/// F8: once the activation has begun no mode is agreed any more.
#[test]
fn no_mode_is_acknowledged_once_the_activation_has_begun() {
    for state in [State::Activating, State::Claiming, State::Confirming, State::Starting] {
        let mut machine = machine_in(state, policy(true, OnPrimaryLoss::Wait));
        assert_eq!(machine.step(Event::Frame(Frame::Token { seq: 2, token: Token::Primary })), []);
        assert_eq!(machine.token(), Token::Witness(key()));
    }
}

/// F6: given up only once the copy is proven gone.
#[test]
fn a_winner_that_cannot_start_forfeits_when_nothing_is_left() {
    for state in [State::Confirming, State::Starting] {
        let mut machine = machine_in(state, policy(true, OnPrimaryLoss::Wait));
        let actions = machine.step(Event::ReceiverDied("x".into()));
        assert!(has(&actions, &Action::DestroyCopy) && !has(&actions, &Action::Forfeit(key())));
        assert_eq!(machine.step(Event::Destroyed), [Action::Forfeit(key())]);
        assert_eq!(machine.state(), State::Forfeiting);
        machine.step(Event::Forfeited);
        assert_eq!(machine.state(), State::Discarded);
    }
}

#[test]
fn a_claim_whose_answer_comes_after_the_copy_has_gone_is_forfeited_too() {
    let dead = || {
        let mut machine = machine_in(State::Claiming, policy(true, OnPrimaryLoss::Wait));
        machine.step(Event::ReceiverDied("x".into()));
        machine
    };
    let mut late = dead();
    assert_eq!(late.step(Event::Destroyed), []);
    assert_eq!(late.step(Event::ClaimUnknown), []);
    assert_eq!(late.step(Event::ClaimWon(key())), [Action::Forfeit(key())]);
    let mut early = dead();
    early.step(Event::ClaimWon(key()));
    assert_eq!(early.step(Event::Destroyed), [Action::Forfeit(key())]);
    let mut lost = dead();
    lost.step(Event::ClaimLost("x".into()));
    lost.step(Event::Destroyed);
    assert_eq!(lost.state(), State::Discarded, "nothing to give up");
}

#[test]
fn a_loser_keeps_its_built_copy_until_the_winner_runs() {
    let mut machine = machine_in(State::Claiming, policy(true, OnPrimaryLoss::Wait));
    let actions = machine.step(Event::ClaimLost("claimed by A".into()));
    assert!(has(&actions, &Action::WatchRecord(key())) && !has(&actions, &Action::DestroyCopy));
    assert_eq!(machine.step(Event::LinkClosed("x".into())), []);
    let mut claims = machine_in(State::Yielding, policy(true, OnPrimaryLoss::Wait));
    assert_eq!(claims.step(Event::RecordForfeited), [Action::Claim(key())]);
    assert_eq!(machine.step(Event::RecordActive("runs on A".into())), [Action::DestroyCopy]);
}

/// Forced between win and GO: the last look sees it.
#[test]
fn a_forced_change_between_win_and_go_is_seen() {
    let mut machine = machine_in(State::Confirming, policy(true, OnPrimaryLoss::Wait));
    let actions = machine.step(Event::ClaimLost("forced by A".into()));
    assert!(!has(&actions, &Action::Go));
    assert_eq!(machine.state(), State::Yielding);
}

#[test]
fn an_operator_asks_the_witness_or_forces_it() {
    let mut asks = machine_in(State::Waiting, policy(true, OnPrimaryLoss::Wait));
    assert!(builds(&asks.step(Event::OperatorFailover { primary_is_off: false })));
    assert_eq!(asks.step(Event::CopyReady), [Action::Claim(key())]);
    let mut forces = machine_in(State::Waiting, policy(true, OnPrimaryLoss::Wait));
    forces.step(Event::OperatorFailover { primary_is_off: true });
    assert_eq!(forces.step(Event::CopyReady), [Action::Force(key())]);
    let newer = RecordKey { generation: Generation(6), ..key() };
    assert_eq!(forces.step(Event::ClaimWon(newer)), [Action::ConfirmClaim(newer)]);
    run(&mut forces, [Event::StillMine]);
    assert!(has(&forces.step(Event::CopyRuns), &Action::Activate(newer)));

    let mut lost = machine_in(State::Yielding, policy(true, OnPrimaryLoss::Wait));
    assert!(matches!(lost.step(Event::OperatorFailover { primary_is_off: false })[..], [Action::Refuse(_)]));
    assert_eq!(lost.step(Event::OperatorFailover { primary_is_off: true }), [Action::Force(key())]);
}

#[test]
fn with_the_witness_gone_too_an_operator_decides_and_the_record_follows() {
    let mut machine = machine_in(State::Claiming, policy(true, OnPrimaryLoss::Wait));
    machine.step(Event::ClaimUnknown);
    assert_eq!(machine.step(Event::AssumeAlone), [Action::Go]);
    assert!(has(&machine.step(Event::CopyRuns), &Action::ForceActive));

    // The token had been agreed to be the primary's, then it failed.
    let mut agreed = armed();
    agree(&mut agreed, 2, Token::Primary);
    run(&mut agreed, [Event::LinkClosed("x".into()), Event::PrimarySuspect]);
    assert!(matches!(agreed.step(Event::OperatorFailover { primary_is_off: false })[..], [Action::Refuse(_)]));
    agreed.step(Event::OperatorFailover { primary_is_off: true });
    assert_eq!(agreed.step(Event::CopyReady), [Action::Go]);
    assert!(has(&agreed.step(Event::CopyRuns), &Action::ForceActive));
}

fn handover(epoch: u64, token: Token) -> Event {
    Event::Frame(Frame::Handover { epoch: Epoch(epoch), token })
}

#[test]
fn a_handed_over_guest_is_claimed_with_a_witness_and_simply_run_without() {
    let mut with = armed();
    assert!(builds(&with.step(handover(1, Token::Witness(key())))));
    assert_eq!(with.step(Event::CopyReady), [Action::Claim(key())], "the primary is alive, and that is in order");
    let mut without = machine_in(State::Armed, policy(false, OnPrimaryLoss::Wait));
    assert!(builds(&without.step(handover(1, Token::Primary))));
    assert_eq!(without.step(Event::LinkClosed("x".into())), []);
    assert_eq!(without.step(Event::CopyReady), [Action::Go], "the frame was the token");
}

#[test]
fn a_hand_over_that_cannot_be_taken_is_answered_once_nothing_is_left() {
    let other = RecordKey { generation: Generation(4), ..key() };
    for wrong in [
        handover(0, Token::Witness(key())),
        handover(2, Token::Witness(key())),
        handover(1, Token::Primary),
        handover(1, Token::Witness(other)),
        Event::HandoverImpossible("name taken".into()),
    ] {
        let mut machine = armed();
        assert_eq!(machine.step(wrong.clone()), [Action::DestroyCopy], "{wrong:?}");
        let actions = machine.step(Event::Destroyed);
        assert!(matches!(actions[0], Action::Send(Frame::HandoverFailed { .. })), "{wrong:?}");
    }
    let mut machine = armed();
    run(&mut machine, [handover(1, Token::Witness(key())), Event::CopyReady, Event::ClaimWon(key())]);
    machine.step(Event::ReceiverDied("x".into()));
    assert_eq!(machine.step(Event::Destroyed), [Action::Forfeit(key())], "the record first");
    assert!(matches!(machine.step(Event::Forfeited)[0], Action::Send(Frame::HandoverFailed { .. })));
}
