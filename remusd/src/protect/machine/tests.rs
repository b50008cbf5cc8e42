use std::fmt;

use super::*;
use crate::ids::{Generation, Nonce};
use crate::link::RecordKey;

mod witness;

fn states() -> Vec<(&'static str, State)> {
    let failed = || StopWhy::Failed("x".into());
    let n = Epoch(7);
    vec![
        ("Starting", State::Starting),
        ("FirstCopy", State::FirstCopy),
        ("Suspending", State::Suspending(n)),
        ("Retrying", State::Retrying(n)),
        ("Capturing", State::Capturing(n)),
        ("Resuming", State::Resuming(n)),
        ("Shipping", State::Shipping(n)),
        ("Committing", State::Committing(n)),
        ("Idle", State::Idle(n)),
        ("ShippingLast", State::ShippingLast(n)),
        ("CommittingLast", State::CommittingLast(n)),
        ("HandingOver", State::HandingOver(n)),
        ("HandedOver", State::HandedOver(n)),
        ("Recording", State::Recording(StopWhy::Planned)),
        ("Stopping", State::Stopping(StopWhy::Planned)),
        ("Arbitrating", State::Arbitrating(failed())),
        ("Holding", State::Holding(failed())),
        ("Yielding", State::Yielding(failed())),
        ("CleaningUp", State::CleaningUp(Outcome::Alone("x".into()))),
        ("Unrecorded", State::Unrecorded(Outcome::Alone("x".into()))),
        ("Ended", State::Ended(Outcome::Alone("x".into()))),
    ]
}

fn key() -> RecordKey {
    RecordKey { generation: Generation(5), nonce: Nonce(uuid::Uuid::from_u128(9)) }
}

fn events() -> Vec<(&'static str, Event)> {
    let x = || "x".to_string();
    vec![
        ("Started", Event::Started),
        ("StartFailed", Event::StartFailed(x())),
        ("EngineSuspend", Event::EngineSuspend),
        ("EngineCopied", Event::EngineCopied),
        ("EngineWaiting", Event::EngineWaiting),
        ("EngineFailed", Event::EngineFailed(x())),
        ("GuestSuspended", Event::GuestSuspended),
        ("SuspendFailed", Event::SuspendFailed(x())),
        ("Postsuspended", Event::Postsuspended),
        ("Preresumed", Event::Preresumed),
        ("Resumed", Event::Resumed),
        ("EpochFailed", Event::EpochFailed(x())),
        ("Ack(same)", Event::Ack { epoch: Epoch(7), pages: 1 }),
        ("Ack(other)", Event::Ack { epoch: Epoch(6), pages: 1 }),
        ("AckLate", Event::AckLate),
        ("Committed", Event::Committed),
        ("Timer", Event::Timer),
        ("BackupLost", Event::BackupLost(x())),
        ("ClaimWon", Event::ClaimWon(key())),
        ("ClaimLost", Event::ClaimLost(x())),
        ("ClaimUnknown", Event::ClaimUnknown),
        ("ClaimRefused", Event::ClaimRefused(x())),
        ("Superseded", Event::Superseded(x())),
        ("WitnessUp", Event::WitnessUp),
        ("WitnessDown", Event::WitnessDown(x())),
        ("RecordArmed", Event::RecordArmed { id: 1, key: key() }),
        ("ArmRefused", Event::ArmRefused { id: 1, text: x() }),
        ("TokenSaved", Event::TokenSaved),
        ("TokenUnsaved", Event::TokenUnsaved(x())),
        ("TokenAck", Event::TokenAck { seq: 1 }),
        ("RecordStopped", Event::RecordStopped),
        ("RecordHanded", Event::RecordHanded),
        ("RecordLost", Event::RecordLost(x())),
        ("RecordUnknown", Event::RecordUnknown(x())),
        ("RecordActive", Event::RecordActive(x())),
        ("RecordForfeited", Event::RecordForfeited),
        ("HandedOverSaved", Event::HandedOverSaved),
        ("HandedOverUnsaved", Event::HandedOverUnsaved(x())),
        ("HandoverRequested", Event::HandoverRequested),
        ("HandoverFailed", Event::HandoverFailed(x())),
        ("HandoverLate", Event::HandoverLate),
        ("AssumeAlone", Event::AssumeAlone),
        ("StopRequested", Event::StopRequested),
        ("Stopped", Event::Stopped),
        ("StopLate", Event::StopLate),
        ("GuestEnded", Event::GuestEnded(GuestEnd::Reboot)),
        ("CleanedUp", Event::CleanedUp),
    ]
}

/// Without a witness, or with one that is up and whose record is agreed.
fn machine_with(state: State, witness: bool) -> Machine {
    let leaving = matches!(
        state,
        State::ShippingLast(_) | State::CommittingLast(_) | State::HandingOver(_) | State::HandedOver(_)
    );
    let token = if witness { Token::Witness(key()) } else { Token::Primary };
    Machine {
        armed_from: Some(Epoch(1)),
        protected: true,
        token,
        arm_id: 1,
        token_seq: 1,
        handover: if leaving { Handover::Leaving } else { Handover::No },
        still: leaving,
        frozen: matches!(state, State::Yielding(_)),
        unrecorded: matches!(state, State::Unrecorded(_)),
        state,
        ..Machine::new(Policy { witness, ..Policy::default() })
    }
}

fn machine_in(state: State) -> Machine {
    machine_with(state, false)
}

fn name(debug: &impl fmt::Debug) -> String {
    let text = format!("{debug:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_string()
}

fn rows(witness: bool) -> Vec<String> {
    let mut rows = vec![];
    for (state_name, state) in states() {
        for (event_name, event) in events() {
            let mut machine = machine_with(state.clone(), witness);
            let before = (machine.agreement, machine.handover, machine.pending_stop.clone());
            let actions = machine.step(event);
            let now = (machine.agreement, machine.handover, machine.pending_stop.clone());
            if actions.is_empty() && machine.state == state && now == before {
                continue;
            }
            let mut notes = vec![];
            if machine.agreement != before.0 {
                notes.push(name(&machine.agreement).to_lowercase());
            }
            if machine.handover == Handover::Requested {
                notes.push("switchover pending".into());
            }
            if machine.pending_stop.is_some() {
                notes.push("stop pending".into());
            }
            let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) };
            let list = actions.iter().map(name).collect::<Vec<_>>().join(", ");
            rows.push(format!("| {state_name} | {event_name} | {}{notes} | {list} |\n", name(&machine.state)));
        }
    }
    rows
}

fn table() -> String {
    let mut out = String::from(
        "# The primary's states\n\nEvery state (protected, epoch 7) against every event: the next state and the actions, in order. \
         A pair that is not listed changes nothing. Written by `machine::tests::table_is_true`; run it with `BLESS=1` to renew.\n\n\
         ## Without a witness\n\n| state | event | next | actions |\n|---|---|---|---|\n",
    );
    let without = rows(false);
    out += &without.concat();
    out += "\n## With a witness\n\nIt is up, its record is armed and agreed with the backup. Only what differs from the table above.\n\n\
            | state | event | next | actions |\n|---|---|---|---|\n";
    out += &rows(true).into_iter().filter(|row| !without.contains(row)).collect::<String>();
    out
}

#[test]
fn table_is_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/protect/machine/states.md");
    let now = table();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == now, "states.md differs from the code; read the change, then run with BLESS=1:\n{now}");
}

fn suspended(state: &State) -> bool {
    matches!(
        state,
        State::Suspending(_)
            | State::Capturing(_)
            | State::Resuming(_)
            | State::ShippingLast(_)
            | State::CommittingLast(_)
            | State::HandingOver(_)
            | State::HandedOver(_)
    )
}

fn both() -> impl Iterator<Item = (bool, &'static str, State, &'static str, Event)> {
    [false, true].into_iter().flat_map(|witness| {
        states().into_iter().flat_map(move |(state_name, state)| {
            events().into_iter().map(move |(event_name, event)| (witness, state_name, state.clone(), event_name, event))
        })
    })
}

/// R6: whatever ends an epoch while the guest may stand still, the guest runs before anything else is done. Not once it may be the
/// other's: then only ownership lets it go on (R3).
#[test]
fn leaving_the_suspended_section_runs_the_guest_first() {
    for (witness, state_name, state, event_name, event) in both().filter(|(_, _, state, ..)| suspended(state)) {
        let mut machine = machine_with(state.clone(), witness);
        let actions = machine.step(event.clone());
        let given = matches!(state, State::HandingOver(_) | State::HandedOver(_));
        let excused = matches!(
            event,
            // The guest runs already, has no vCPUs to run, or must not run.
            Event::Resumed | Event::SuspendFailed(_) | Event::GuestEnded(_) | Event::Superseded(_)
        ) || given
            && matches!(machine.state, State::Arbitrating(_) | State::Holding(_) | State::Yielding(_));
        if !suspended(&machine.state) && !excused {
            let first = actions.iter().find(|a| !matches!(a, Action::ReportHandoverFailed(_)));
            assert_eq!(first, Some(&Action::EnsureRunning), "{state_name} on {event_name}, witness {witness}");
        }
    }
}

/// R1, R3: output is released only by a commit after this epoch's acknowledgement, or by cleaning up as the owner.
#[test]
fn output_is_released_only_by_ack_or_ownership() {
    for (witness, state_name, state, event_name, event) in both() {
        let mut machine = machine_with(state.clone(), witness);
        let pair = format!("{state_name} on {event_name}, witness {witness}");
        for action in machine.step(event.clone()) {
            match action {
                Action::Commit(epoch) => {
                    assert!(matches!(state, State::Shipping(e) | State::ShippingLast(e) if e == epoch), "{pair}");
                    assert!(matches!(event, Event::Ack { epoch: e, .. } if e == epoch), "{pair}");
                }
                Action::CleanUp { output: Output::Release, .. } => {
                    let owner = match event {
                        Event::ClaimWon(_) => {
                            matches!(state, State::Arbitrating(_) | State::Holding(_) | State::Yielding(_))
                        }
                        // The backup has said that its copy is gone, or the record that nobody can claim it.
                        Event::Stopped => !matches!(state, State::Yielding(_)),
                        Event::RecordStopped => true,
                        Event::AssumeAlone => matches!(state, State::Holding(_)),
                        Event::HandoverFailed(_) => !witness,
                        // The token is the primary's; a handed-over guest is not.
                        Event::BackupLost(_) | Event::StopLate | Event::RecordUnknown(_) => {
                            !witness && !matches!(state, State::HandedOver(_))
                        }
                        Event::StopRequested => !witness && matches!(state, State::Holding(_)),
                        Event::GuestEnded(_) => matches!(state, State::Unrecorded(_)),
                        _ => false,
                    };
                    assert!(owner || state == State::Starting, "{pair}");
                }
                Action::Unfreeze => assert!(matches!(event, Event::ClaimWon(_)), "{pair}"),
                _ => {}
            }
        }
    }
}

/// R3: once the other copy is active, this one is frozen, and nothing is released.
#[test]
fn superseded_freezes_in_every_state() {
    for (_, state) in states() {
        if matches!(state, State::Starting | State::CleaningUp(_) | State::Unrecorded(_) | State::Ended(_)) {
            continue;
        }
        let mut machine = machine_in(state);
        let frozen = machine.frozen;
        let actions = machine.step(Event::Superseded("other runs".into()));
        assert_eq!(actions[0], Action::SaveSuperseded);
        assert!(frozen || actions[1] == Action::Freeze);
        let (output, fate, kept) = (Output::Discard, DomainFate::Destroy, Kept::Forget);
        assert_eq!(actions[2 - usize::from(frozen)], Action::CleanUp { output, fate, kept });
    }
}

/// R3: with a witness nothing but its word, the backup's word that no copy is left, or an operator lets the guest go on alone.
#[test]
fn a_lost_backup_is_claimed_from_before_anything_is_released() {
    for (state_name, state) in states() {
        let mut machine = machine_with(state.clone(), true);
        let actions = machine.step(Event::BackupLost("cut".into()));
        if machine.state != state && state != State::Starting {
            let why = match &state {
                State::Stopping(why) => why.clone(),
                _ => StopWhy::Failed("cut".into()),
            };
            assert_eq!(machine.state, State::Arbitrating(why));
            assert_eq!(actions.last(), Some(&Action::Claim(key())), "{state_name}");
        }
        assert!(
            !actions.iter().any(|a| matches!(a, Action::CleanUp { output: Output::Release, .. }))
                || state == State::Starting,
            "{state_name}"
        );
    }
}

fn run(machine: &mut Machine, events: impl IntoIterator<Item = Event>) -> Vec<Action> {
    events.into_iter().flat_map(|e| machine.step(e)).collect()
}

fn epoch(n: u64, pages: u64) -> Vec<Event> {
    vec![
        Event::EngineSuspend,
        Event::GuestSuspended,
        Event::Postsuspended,
        Event::EngineCopied,
        Event::Preresumed,
        Event::Resumed,
        Event::EngineWaiting,
        Event::Ack { epoch: Epoch(n), pages },
        Event::Committed,
        Event::Timer,
    ]
}

#[test]
fn arms_after_a_small_epoch_and_never_the_first_copy() {
    let mut machine = Machine::new(Policy { arm_pages: 100, max_unarmed: 9, ..Policy::default() });
    run(&mut machine, [Event::Started]);
    let armed = |actions: &[Action]| {
        actions.iter().find_map(|a| match a {
            Action::Suspend { armed, .. } => Some(*armed),
            _ => None,
        })
    };
    assert_eq!(armed(&run(&mut machine, epoch(0, 30_000))), Some(false));
    assert_eq!(armed(&run(&mut machine, epoch(1, 500))), Some(false));
    assert!(!machine.is_protected());
    assert_eq!(armed(&run(&mut machine, epoch(2, 90))), Some(false));
    let third = run(&mut machine, epoch(3, 5_000));
    assert_eq!(armed(&third), Some(true));
    assert!(third.contains(&Action::ReportProtected(Epoch(3))));
    assert_eq!(armed(&run(&mut machine, epoch(4, 5_000))), Some(true), "once armed, always armed");
    assert!(machine.is_protected());
}

#[test]
fn arms_a_guest_that_never_calms_down() {
    let mut machine = Machine::new(Policy { arm_pages: 1, max_unarmed: 3, ..Policy::default() });
    run(&mut machine, [Event::Started]);
    for n in 0..3 {
        run(&mut machine, epoch(n, 9_999));
    }
    assert_eq!(machine.armed_from, None);
    run(&mut machine, epoch(3, 9_999));
    assert_eq!(machine.armed_from, Some(Epoch(3)));
}

#[test]
fn a_guest_that_does_not_suspend_is_retried_then_unprotected() {
    let mut machine = machine_in(State::Idle(Epoch(7)));
    run(&mut machine, [Event::EngineSuspend]);
    for _ in 0..Policy::default().suspend_retries {
        let actions = machine.step(Event::SuspendFailed("deaf".into()));
        assert!(actions.contains(&Action::StartTimer));
        run(&mut machine, [Event::Timer]);
    }
    let actions = machine.step(Event::SuspendFailed("deaf".into()));
    assert_eq!(actions, [Action::SendStop(StopWhy::Failed("deaf".into()))]);
    let actions = machine.step(Event::Stopped);
    assert!(actions.contains(&Action::ReportUnprotected("deaf".into())));
}

#[test]
fn a_stop_while_suspended_waits_until_the_guest_runs() {
    let mut machine = machine_in(State::Capturing(Epoch(7)));
    assert!(machine.step(Event::StopRequested).is_empty());
    let actions = run(&mut machine, [Event::EngineCopied, Event::Preresumed, Event::Resumed]);
    assert_eq!(actions, [Action::Preresume(Epoch(7)), Action::Resume, Action::SendStop(StopWhy::Planned)]);
}
