//! Schedules with a witness.

use super::*;

fn idle() -> Machine {
    machine_with(State::Idle(Epoch(7)), true)
}

fn ends_with(actions: &[Action], last: &Action) -> bool {
    actions.last() == Some(last)
}

fn releases(actions: &[Action]) -> bool {
    actions.iter().any(|a| matches!(a, Action::CleanUp { output: Output::Release, .. }))
}

#[test]
fn arms_the_record_then_itself_then_the_backup_then_epochs() {
    let mut machine = Machine::new(Policy { witness: true, arm_pages: 100, ..Policy::default() });
    assert_eq!(run(&mut machine, [Event::Started]), [Action::StartEngine, Action::ArmRecord { id: 1 }]);
    let armed = |actions: Vec<Action>| actions.iter().any(|a| matches!(a, Action::Suspend { armed: true, .. }));
    run(&mut machine, epoch(0, 1));
    assert!(!armed(run(&mut machine, epoch(1, 1))), "the record is not armed yet");
    let witness = Token::Witness(key());
    let actions = machine.step(Event::RecordArmed { id: 1, key: key() });
    assert_eq!(actions, [Action::SaveToken(witness)]);
    assert_eq!(machine.token(), witness, "from here on a claim is needed");
    assert_eq!(machine.step(Event::TokenSaved), [Action::SendToken { seq: 1, token: witness }]);
    assert!(!armed(run(&mut machine, epoch(2, 1))), "the backup has not confirmed");
    assert!(matches!(machine.step(Event::TokenAck { seq: 1 })[..], [Action::ReportToken(t, _)] if t == witness));
    assert!(armed(run(&mut machine, epoch(3, 1))));
}

#[test]
fn a_record_that_may_not_be_armed_ends_the_attempt() {
    let mut machine = Machine::new(Policy { witness: true, ..Policy::default() });
    run(&mut machine, [Event::Started]);
    let actions = machine.step(Event::ArmRefused { id: 1, text: "it runs on B".into() });
    assert_eq!(actions, [Action::SendStop(StopWhy::Failed("it runs on B".into()))]);
}

#[test]
fn without_an_answer_from_the_witness_the_token_is_the_primarys() {
    let mut machine = Machine::new(Policy { witness: true, ..Policy::default() });
    run(&mut machine, [Event::Started]);
    run(&mut machine, epoch(0, 1));
    let actions = machine.step(Event::WitnessDown("silent".into()));
    assert!(matches!(actions[..], [Action::ReportToken(Token::Primary, _)]));
    let actions = run(&mut machine, epoch(1, 1));
    assert!(actions.iter().any(|a| matches!(a, Action::Suspend { armed: true, .. })));
    assert_eq!(machine.step(Event::RecordArmed { id: 1, key: key() }), [], "too late");
    assert_eq!(machine.step(Event::WitnessUp), [Action::ArmRecord { id: 2 }]);
    assert_eq!(machine.step(Event::RecordArmed { id: 1, key: key() }), [], "of the first arming");
    assert!(!machine.step(Event::RecordArmed { id: 2, key: key() }).is_empty());
}

/// F19: only the backup's durable word ends witness mode.
#[test]
fn a_witness_that_goes_is_agreed_on_before_it_does_not_count() {
    let mut machine = idle();
    let actions = machine.step(Event::WitnessDown("gone".into()));
    assert_eq!(actions, [Action::SendToken { seq: 2, token: Token::Primary }]);
    let mut lost = machine.clone();
    let actions = lost.step(Event::BackupLost("cut".into()));
    assert!(ends_with(&actions, &Action::Claim(key())), "the backup may not have heard it");
    assert!(lost.step(Event::ClaimUnknown).iter().any(|a| matches!(a, Action::ReportHolding(_))));
    assert_eq!(machine.step(Event::TokenAck { seq: 1 }), [], "an old proposal's");
    assert_eq!(machine.step(Event::TokenAck { seq: 2 }), [Action::SaveToken(Token::Primary)]);
    assert_eq!(machine.token(), Token::Witness(key()), "not durable yet");
    machine.step(Event::TokenSaved);
    assert_eq!(machine.token(), Token::Primary);
    assert!(releases(&machine.clone().step(Event::BackupLost("cut".into()))), "R6");

    // It is back: first the record, then we, then the backup.
    assert_eq!(machine.step(Event::WitnessUp), [Action::ArmRecord { id: 2 }]);
    let newer = RecordKey { generation: Generation(6), ..key() };
    machine.step(Event::RecordArmed { id: 2, key: newer });
    assert!(ends_with(&machine.clone().step(Event::BackupLost("cut".into())), &Action::Claim(newer)));
    assert_eq!(machine.step(Event::TokenSaved), [Action::SendToken { seq: 3, token: Token::Witness(newer) }]);
    // And gone again before the backup confirmed.
    let actions = machine.step(Event::WitnessDown("gone".into()));
    assert_eq!(actions, [Action::SendToken { seq: 4, token: Token::Primary }]);
    assert_eq!(machine.step(Event::TokenAck { seq: 3 }), []);
    assert_eq!(machine.token(), Token::Witness(newer));
    run(&mut machine, [Event::WitnessUp]);
    let actions = run(&mut machine, [Event::TokenAck { seq: 4 }, Event::TokenSaved]);
    assert!(ends_with(&actions, &Action::ArmRecord { id: 3 }), "it was up again meanwhile");
}

#[test]
fn a_mode_that_cannot_be_written_is_not_taken() {
    let mut machine = machine_with(State::Idle(Epoch(7)), true);
    machine.token = Token::Primary;
    assert_eq!(machine.step(Event::WitnessUp), [Action::ArmRecord { id: 2 }]);
    machine.step(Event::RecordArmed { id: 2, key: key() });
    machine.step(Event::TokenUnsaved("disk full".into()));
    assert_eq!((machine.token(), machine.agreement()), (Token::Primary, Agreement::Agreed));
    machine.step(Event::WitnessDown("x".into()));
    assert_eq!(machine.step(Event::WitnessUp), [Action::ArmRecord { id: 3 }]);
}

#[test]
fn winning_the_record_lets_output_flow_and_is_recorded() {
    let mut machine = idle();
    machine.step(Event::BackupLost("cut".into()));
    let actions = machine.step(Event::ClaimWon(key()));
    assert_eq!(actions[0], Action::Activate(key()));
    assert!(releases(&actions));
    assert_eq!(machine.state, State::CleaningUp(Outcome::Alone("cut".into())));
}

/// F6, F8: lost is not destroyed; acknowledgements that come in late release nothing.
#[test]
fn the_loser_is_frozen_until_the_winner_runs_or_gives_up() {
    let mut lost = idle();
    lost.step(Event::BackupLost("cut".into()));
    assert_eq!(lost.step(Event::Ack { epoch: Epoch(7), pages: 1 }), []);
    let actions = lost.step(Event::ClaimLost("claimed by B".into()));
    assert_eq!(actions[..2], [Action::Freeze, Action::WatchRecord(key())]);
    for event in [Event::Stopped, Event::WitnessUp, Event::StopRequested, Event::ClaimUnknown] {
        assert_eq!(lost.clone().step(event), []);
    }

    let mut superseded = lost.clone();
    let actions = superseded.step(Event::RecordActive("runs on B".into()));
    assert!(actions.contains(&Action::SaveSuperseded));
    let (output, fate, kept) = (Output::Discard, DomainFate::Destroy, Kept::Forget);
    assert!(actions.contains(&Action::CleanUp { output, fate, kept }));

    let actions = lost.step(Event::RecordForfeited);
    assert_eq!(actions, [Action::ReportForfeited, Action::Claim(key())]);
    assert!(lost.clone().step(Event::ClaimUnknown).iter().all(|a| !matches!(a, Action::Unfreeze)));
    let actions = lost.step(Event::ClaimWon(key()));
    let unfreeze = actions.iter().position(|a| *a == Action::Unfreeze).unwrap();
    assert!(releases(&actions[unfreeze..]));
}

#[test]
fn holding_asks_again_when_the_witness_is_back_and_takes_late_answers() {
    let mut machine = idle();
    machine.step(Event::BackupLost("cut".into()));
    machine.step(Event::ClaimUnknown);
    assert!(matches!(machine.state, State::Holding(_)));
    assert_eq!(machine.step(Event::StopRequested), [], "an operator must say more than that");
    assert!(releases(&machine.clone().step(Event::ClaimWon(key()))));
    assert_eq!(machine.step(Event::WitnessUp), [Action::Claim(key())]);
}

#[test]
fn an_operators_word_lets_output_flow_and_the_record_is_won_later() {
    let mut machine = idle();
    run(&mut machine, [Event::BackupLost("cut".into()), Event::ClaimUnknown]);
    let actions = machine.step(Event::AssumeAlone);
    assert!(actions.iter().any(|a| matches!(a, Action::CleanUp { output: Output::Release, kept: Kept::Keep, .. })));
    assert_eq!(machine.step(Event::CleanedUp), [Action::Claim(key())]);
    assert_eq!(machine.step(Event::ClaimUnknown), []);
    assert_eq!(machine.step(Event::WitnessUp), [Action::Claim(key())]);
    let mut conflict = machine.clone();
    let actions = conflict.step(Event::ClaimLost("runs on B".into()));
    assert!(
        matches!(actions[..], [Action::ReportConflict(_), Action::Forget, Action::End(_)]),
        "F5: neither is stopped"
    );
    let actions = machine.step(Event::ClaimWon(key()));
    assert!(matches!(actions[..], [Action::Activate(_), Action::Forget, Action::End(_)]));
}

#[test]
fn a_frozen_loser_is_let_go_by_an_operator_only_through_the_record() {
    let mut machine = machine_with(State::Yielding(StopWhy::Failed("x".into())), true);
    assert_eq!(machine.step(Event::AssumeAlone), [Action::ForceRecord(key())]);
    let newer = RecordKey { generation: Generation(6), ..key() };
    let actions = machine.step(Event::ClaimWon(newer));
    assert_eq!(actions[0], Action::Activate(newer));
    assert!(actions.contains(&Action::Unfreeze));
}

/// F24: the stop is recorded before the backup hears of it, and then its silence does not matter.
#[test]
fn a_stop_is_recorded_first() {
    let mut machine = idle();
    assert_eq!(machine.step(Event::GuestEnded(GuestEnd::Poweroff)), [Action::StopRecord(key())]);
    let mut silent = machine.clone();
    assert_eq!(silent.step(Event::RecordStopped), [Action::SendStop(StopWhy::GuestEnded(GuestEnd::Poweroff))]);
    assert!(releases(&silent.step(Event::StopLate)));

    let mut cut = machine.clone();
    assert_eq!(cut.step(Event::BackupLost("cut".into())), []);
    assert!(releases(&cut.step(Event::RecordStopped)));

    let mut late = machine.clone();
    let actions = late.step(Event::RecordLost("claimed by B".into()));
    assert_eq!(actions[..2], [Action::Freeze, Action::WatchRecord(key())]);

    let mut unknown = machine.clone();
    assert_eq!(unknown.step(Event::RecordUnknown("x".into())).len(), 1);
    assert_eq!(unknown.clone().step(Event::StopLate), [Action::Claim(key())]);
    assert!(releases(&unknown.step(Event::Stopped)));
}

fn leaving(witness: bool) -> Machine {
    let mut machine = machine_with(State::Idle(Epoch(6)), witness);
    assert_eq!(machine.step(Event::HandoverRequested), []);
    assert!(matches!(machine.step(Event::HandoverRequested)[..], [Action::RefuseHandover(_)]), "once");
    run(&mut machine, [Event::Timer, Event::EngineSuspend, Event::GuestSuspended, Event::Postsuspended]);
    let actions = machine.step(Event::EngineCopied);
    assert_eq!(actions, [Action::HoldStill, Action::EngineResumed], "the guest is not resumed");
    run(&mut machine, [Event::EngineWaiting]);
    machine
}

fn handed(witness: bool) -> Machine {
    let mut machine = leaving(witness);
    assert_eq!(machine.step(Event::Ack { epoch: Epoch(7), pages: 1 }), [Action::Commit(Epoch(7))]);
    let actions = machine.step(Event::Committed);
    let token = machine.token();
    let (record, recorded) = match witness {
        true => (Action::HandRecord(key()), Event::RecordHanded),
        false => (Action::SaveHandedOver, Event::HandedOverSaved),
    };
    assert_eq!(actions, [record]);
    assert_eq!(machine.step(recorded), [Action::SendHandover { epoch: Epoch(7), token }]);
    machine
}

#[test]
fn a_switchover_gives_the_guest_away_only_after_its_last_epoch_is_acknowledged_and_released() {
    for witness in [false, true] {
        let mut machine = handed(witness);
        assert!(!machine.is_protected());
        for event in [Event::StopRequested, Event::Timer, Event::AssumeAlone, Event::ClaimUnknown] {
            assert_eq!(machine.step(event), []);
        }
        let actions = machine.step(Event::Superseded("runs".into()));
        assert!(actions.contains(&Action::SaveSuperseded) && !releases(&actions));
        assert_eq!(machine.state, State::CleaningUp(Outcome::HandedOver("runs".into())));
    }
}

#[test]
fn a_failed_switchover_is_taken_back_through_the_record() {
    for event in [Event::HandoverFailed("x".into()), Event::BackupLost("x".into()), Event::HandoverLate] {
        let mut machine = handed(true);
        assert!(ends_with(&machine.step(event), &Action::Claim(key())));
        let mut lost = machine.clone();
        assert!(lost.step(Event::ClaimLost("B".into())).contains(&Action::Freeze));
        let actions = machine.step(Event::ClaimWon(key()));
        let running = actions.iter().position(|a| *a == Action::EnsureRunning).unwrap();
        assert!(releases(&actions[running..]), "it goes on here");
    }
}

#[test]
fn without_a_witness_only_the_backup_or_an_operator_gives_a_handed_over_guest_back() {
    let mut failed = handed(false);
    let actions = failed.step(Event::HandoverFailed("x".into()));
    assert!(actions.contains(&Action::EnsureRunning) && releases(&actions));
    for event in [Event::BackupLost("x".into()), Event::HandoverLate] {
        let mut lost = handed(false);
        lost.step(event);
        assert!(matches!(lost.state, State::Holding(_)));
        assert_eq!(lost.step(Event::StopRequested), []);
        let mut late = lost.clone();
        late.step(Event::Superseded("runs".into()));
        assert_eq!(late.state, State::CleaningUp(Outcome::HandedOver("runs".into())));
        let actions = lost.step(Event::AssumeAlone);
        assert!(actions.contains(&Action::EnsureRunning) && releases(&actions));
    }
}

#[test]
fn a_switchover_that_cannot_be_recorded_is_called_off_and_protection_goes_on() {
    for (witness, event) in
        [(true, Event::RecordUnknown("silent".into())), (false, Event::HandedOverUnsaved("disk full".into()))]
    {
        let mut machine = leaving(witness);
        run(&mut machine, [Event::Ack { epoch: Epoch(7), pages: 1 }, Event::Committed]);
        let actions = machine.step(event);
        assert!(ends_with(&actions, &Action::Preresume(Epoch(7))));
        assert_eq!(run(&mut machine, [Event::Preresumed]), [Action::Resume]);
        assert_eq!(run(&mut machine, [Event::Resumed]), [Action::StartTimer]);
        assert_eq!(machine.state, State::Idle(Epoch(7)));
        assert!(machine.is_protected());
    }
}

#[test]
fn what_goes_wrong_before_the_hand_over_lets_the_guest_run_first() {
    for event in [Event::BackupLost("x".into()), Event::EngineFailed("x".into()), Event::AckLate, Event::StopRequested]
    {
        let mut machine = leaving(true);
        assert_eq!(machine.step(event)[0], Action::EnsureRunning);
    }
    let mut machine = leaving(true);
    run(&mut machine, [Event::Ack { epoch: Epoch(7), pages: 1 }, Event::Committed]);
    let actions = machine.step(Event::RecordLost("claimed by B".into()));
    assert!(actions.contains(&Action::Freeze), "the backup was faster");
}

/// The mode is not changed while the guest is being given away.
#[test]
fn a_witness_that_goes_during_a_switchover_is_looked_at_afterwards() {
    let mut machine = leaving(true);
    assert_eq!(machine.step(Event::WitnessDown("x".into())), []);
    run(&mut machine, [Event::Ack { epoch: Epoch(7), pages: 1 }, Event::Committed]);
    run(&mut machine, [Event::RecordUnknown("x".into()), Event::Preresumed]);
    let actions = machine.step(Event::Resumed);
    assert!(ends_with(&actions, &Action::SendToken { seq: 2, token: Token::Primary }));
}
