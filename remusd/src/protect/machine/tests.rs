use std::fmt;

use super::*;

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
        ("Stopping", State::Stopping(StopWhy::Planned)),
        ("Arbitrating", State::Arbitrating(failed())),
        ("Holding", State::Holding(failed())),
        ("CleaningUp", State::CleaningUp(Outcome::Alone("x".into()))),
        ("Ended", State::Ended(Outcome::Alone("x".into()))),
    ]
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
        ("ClaimWon", Event::ClaimWon),
        ("ClaimLost", Event::ClaimLost(x())),
        ("ClaimUnknown", Event::ClaimUnknown),
        ("Superseded", Event::Superseded(x())),
        ("StopRequested", Event::StopRequested),
        ("Stopped", Event::Stopped),
        ("StopLate", Event::StopLate),
        ("GuestEnded", Event::GuestEnded(GuestEnd::Reboot)),
        ("CleanedUp", Event::CleanedUp),
    ]
}

fn machine_in(state: State) -> Machine {
    Machine { state, armed_from: Some(Epoch(1)), protected: true, ..Machine::new(Policy::default()) }
}

fn name(debug: &impl fmt::Debug) -> String {
    let text = format!("{debug:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_string()
}

fn table() -> String {
    let mut out = String::from(
        "# The primary's states\n\nEvery state (protected, epoch 7) against every event: the next state and the actions, in order. \
         A pair that is not listed changes nothing. Written by `machine::tests::table_is_true`; run it with `BLESS=1` to renew.\n\n\
         | state | event | next | actions |\n|---|---|---|---|\n",
    );
    for (state_name, state) in states() {
        for (event_name, event) in events() {
            let mut machine = machine_in(state.clone());
            let actions = machine.step(event);
            if actions.is_empty() && machine.state == state && machine.pending_stop.is_none() {
                continue;
            }
            let pending = if machine.pending_stop.is_some() { " (stop pending)" } else { "" };
            let list = actions.iter().map(name).collect::<Vec<_>>().join(", ");
            out += &format!("| {state_name} | {event_name} | {}{pending} | {list} |\n", name(&machine.state));
        }
    }
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
    matches!(state, State::Suspending(_) | State::Capturing(_) | State::Resuming(_))
}

/// R6: whatever ends an epoch while the guest may stand still, the guest runs before anything else is done.
#[test]
fn leaving_the_suspended_section_runs_the_guest_first() {
    for (state_name, state) in states().into_iter().filter(|(_, s)| suspended(s)) {
        for (event_name, event) in events() {
            let mut machine = machine_in(state.clone());
            let actions = machine.step(event.clone());
            let left = !suspended(&machine.state);
            let excused = matches!(
                event,
                // The guest runs already, has no vCPUs to run, or must not run.
                Event::Resumed
                    | Event::SuspendFailed(_)
                    | Event::GuestEnded(_)
                    | Event::Superseded(_)
                    | Event::ClaimLost(_)
            );
            if left && !excused {
                assert_eq!(actions.first(), Some(&Action::EnsureRunning), "{state_name} on {event_name}");
            }
        }
    }
}

/// R1: output is released only by a commit after this epoch's acknowledgement, or by cleaning up as the owner.
#[test]
fn output_is_released_only_by_ack_or_ownership() {
    for (state_name, state) in states() {
        for (event_name, event) in events() {
            let mut machine = machine_in(state.clone());
            for action in machine.step(event.clone()) {
                match action {
                    Action::Commit(epoch) => {
                        assert_eq!(state, State::Shipping(epoch), "{event_name}");
                        assert!(
                            matches!(event, Event::Ack { epoch: e, .. } if e == epoch),
                            "{state_name} on {event_name}"
                        );
                    }
                    Action::CleanUp { output: Output::Release, .. } => assert!(
                        matches!(event, Event::ClaimWon | Event::Stopped)
                            || state == State::Starting
                            || (matches!(state, State::Holding(_)) && event == Event::StopRequested),
                        "{state_name} on {event_name}"
                    ),
                    _ => {}
                }
            }
        }
    }
}

/// R3: once the other copy is active, this one is frozen first, and nothing is released.
#[test]
fn superseded_freezes_first_in_every_state() {
    for (state_name, state) in states() {
        if matches!(state, State::Starting | State::CleaningUp(_) | State::Ended(_)) {
            continue;
        }
        let mut machine = machine_in(state);
        let actions = machine.step(Event::Superseded("other runs".into()));
        assert_eq!(actions[0], Action::Freeze, "{state_name}");
        assert_eq!(actions[1], Action::CleanUp { output: Output::Discard, fate: DomainFate::Destroy }, "{state_name}");
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
