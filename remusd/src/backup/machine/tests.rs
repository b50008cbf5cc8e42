mod schedules;
mod witness;

use super::*;
use crate::ids::{Generation, Nonce};
use crate::link::{Heartbeat, RecordKey, StatePart, Token};
use crate::stream::digest::Digester;
use crate::stream::{Layer, PageBatch, Record};

fn policy(witness: bool, on_primary_loss: OnPrimaryLoss) -> Policy {
    Policy { on_primary_loss, witness, staging_limit: 64 * 1024, backlog_epochs: 1, backlog_bytes: 1 << 20 }
}

fn batch(epoch: u64) -> PageBatch {
    PageBatch { entries: vec![epoch], data: vec![epoch as u8; crate::stream::PAGE_SIZE].into() }
}

fn part(epoch: u64) -> StatePart {
    let data = Bytes::from(epoch.to_le_bytes().to_vec());
    StatePart { epoch: Epoch(epoch), layer: Layer::Libxc, kind: 9, total: 8, offset: 0, data }
}

fn end(epoch: u64, armed: bool) -> EpochEnd {
    let mut digester = Digester::new();
    digester.pages(&batch(epoch));
    let StatePart { layer, kind, data: body, .. } = part(epoch);
    digester.record(&Record { layer, kind, body });
    let bytes = crate::stream::PAGE_SIZE as u64 + 8;
    EpochEnd { epoch: Epoch(epoch), armed, digest: digester.finish(), pages: 1, bytes, records: 1 }
}

fn frames(epoch: u64, armed: bool) -> Vec<Event> {
    [
        Frame::EpochBegin { epoch: Epoch(epoch), armed },
        Frame::Pages { epoch: Epoch(epoch), batch: batch(epoch) },
        Frame::State(part(epoch)),
        Frame::EpochEnd(end(epoch, armed)),
    ]
    .map(Event::Frame)
    .to_vec()
}

fn head() -> Vec<Event> {
    vec![
        Event::Frame(Frame::Config(Bytes::from_static(b"{}"))),
        Event::Frame(Frame::Preamble(Bytes::from_static(b"x"))),
    ]
}

fn run(machine: &mut Machine, events: impl IntoIterator<Item = Event>) -> Actions {
    events.into_iter().flat_map(|event| machine.step(event)).collect()
}

const STATES: [State; 12] = [
    State::Syncing,
    State::Armed,
    State::Waiting,
    State::Activating,
    State::Claiming,
    State::Confirming,
    State::Starting,
    State::Active,
    State::Yielding,
    State::Discarding,
    State::Forfeiting,
    State::Discarded,
];

fn key() -> RecordKey {
    RecordKey { generation: Generation(5), nonce: Nonce(uuid::Uuid::from_u128(9)) }
}

/// Whether only a claim leads there.
fn claims(state: State) -> bool {
    matches!(state, State::Claiming | State::Confirming | State::Yielding | State::Forfeiting)
}

/// A machine brought to a state by events alone. Where there is an armed epoch it is 1, acknowledged; epoch 2 is open.
fn machine_in(state: State, policy: Policy) -> Machine {
    let witness = policy.witness;
    let mut machine = Machine::new(policy);
    run(&mut machine, head());
    if witness {
        agree(&mut machine, 1, Token::Witness(key()));
    }
    run(&mut machine, frames(0, false));
    machine.step(Event::Alive(Epoch(0)));
    let armed = |machine: &mut Machine| {
        run(machine, frames(1, true));
        machine.step(Event::Alive(Epoch(1)));
        run(machine, [Event::Drained(Epoch(1))]);
        machine.step(Event::Frame(Frame::EpochBegin { epoch: Epoch(2), armed: true }));
    };
    let failover = match witness {
        true => vec![Event::PrimarySuspect, Event::GraceOver, Event::LanUp],
        false => vec![Event::PrimarySuspect, Event::OperatorFailover { primary_is_off: true }],
    };
    match state {
        State::Syncing => {}
        State::Armed => armed(&mut machine),
        State::Waiting => {
            armed(&mut machine);
            machine.step(Event::LinkClosed("cut".into()));
        }
        State::Activating
        | State::Claiming
        | State::Confirming
        | State::Starting
        | State::Active
        | State::Yielding
        | State::Forfeiting => {
            armed(&mut machine);
            run(&mut machine, failover);
            if state != State::Activating {
                machine.step(Event::CopyReady);
            }
            if matches!(state, State::Confirming | State::Starting | State::Active) {
                machine.step(Event::ClaimWon(key()));
            }
            if matches!(state, State::Starting | State::Active) {
                machine.step(Event::StillMine);
            }
            if state == State::Active {
                machine.step(Event::CopyRuns);
            }
            if state == State::Yielding {
                machine.step(Event::ClaimLost("x".into()));
            }
            if state == State::Forfeiting {
                run(&mut machine, [Event::ReceiverDied("x".into()), Event::Destroyed]);
            }
        }
        State::Discarding | State::Discarded => {
            armed(&mut machine);
            machine.step(Event::OperatorDiscard);
            if state == State::Discarded {
                machine.step(Event::Destroyed);
            }
        }
    }
    assert_eq!(machine.state(), state);
    machine
}

fn agree(machine: &mut Machine, seq: u64, token: Token) {
    let actions = machine.step(Event::Frame(Frame::Token { seq, token }));
    assert_eq!(actions, [Action::SaveToken { seq, token }]);
    let actions = machine.step(Event::TokenSaved { seq });
    assert!(actions.contains(&Action::Send(Frame::TokenAck { seq })));
}

/// Claiming is reached only with a witness.
fn usual(state: State) -> Machine {
    machine_in(state, policy(claims(state), OnPrimaryLoss::Wait))
}

fn events() -> Vec<(&'static str, Event)> {
    let text = || "x".to_owned();
    let beat = Heartbeat {
        heard_ms: 0,
        epoch: Epoch(1),
        guest: crate::link::GuestState::Running,
        since_resume_ms: 0,
        wall_clock_ms: 0,
        late: false,
    };
    let bad = EpochEnd { bytes: 0, ..end(2, true) };
    vec![
        ("HEARTBEAT", Event::Frame(Frame::Heartbeat(beat))),
        ("EPOCH_BEGIN(3)", Event::Frame(Frame::EpochBegin { epoch: Epoch(3), armed: true })),
        ("EPOCH_BEGIN(old)", Event::Frame(Frame::EpochBegin { epoch: Epoch(0), armed: true })),
        ("PAGES(2)", Event::Frame(Frame::Pages { epoch: Epoch(2), batch: batch(2) })),
        ("EPOCH_END(2) damaged", Event::Frame(Frame::EpochEnd(bad))),
        ("CONFIG again", Event::Frame(Frame::Config(Bytes::new()))),
        ("STOP", Event::Frame(Frame::Stop { reason: StopReason::Planned })),
        ("TOKEN(primary)", Event::Frame(Frame::Token { seq: 7, token: Token::Primary })),
        ("TOKEN(witness)", Event::Frame(Frame::Token { seq: 8, token: Token::Witness(key()) })),
        ("HANDOVER(1, primary)", Event::Frame(Frame::Handover { epoch: Epoch(1), token: Token::Primary })),
        ("HANDOVER(1, witness)", Event::Frame(Frame::Handover { epoch: Epoch(1), token: Token::Witness(key()) })),
        ("HANDOVER(0, primary)", Event::Frame(Frame::Handover { epoch: Epoch(0), token: Token::Primary })),
        ("Drained(1)", Event::Drained(Epoch(1))),
        ("Alive(1)", Event::Alive(Epoch(1))),
        ("CopyReady", Event::CopyReady),
        ("CopyRuns", Event::CopyRuns),
        ("ReceiverDied", Event::ReceiverDied(text())),
        ("PrimarySuspect", Event::PrimarySuspect),
        ("PrimaryAlive", Event::PrimaryAlive),
        ("LinkClosed", Event::LinkClosed(text())),
        ("OperatorFailover", Event::OperatorFailover { primary_is_off: false }),
        ("OperatorFailover, primary is off", Event::OperatorFailover { primary_is_off: true }),
        ("OperatorDiscard", Event::OperatorDiscard),
        ("GraceOver", Event::GraceOver),
        ("LanUp", Event::LanUp),
        ("LanDown", Event::LanDown(text())),
        ("HandoverImpossible", Event::HandoverImpossible(text())),
        ("ClaimWon", Event::ClaimWon(key())),
        ("ClaimLost", Event::ClaimLost(text())),
        ("ClaimUnknown", Event::ClaimUnknown),
        ("ClaimRefused", Event::ClaimRefused(text())),
        ("StillMine", Event::StillMine),
        ("RecordActive", Event::RecordActive(text())),
        ("RecordForfeited", Event::RecordForfeited),
        ("Forfeited", Event::Forfeited),
        ("AssumeAlone", Event::AssumeAlone),
        ("Replaced", Event::Replaced),
        ("Shutdown", Event::Shutdown),
        ("Destroyed", Event::Destroyed),
    ]
}

fn name(action: &Action) -> String {
    match action {
        Action::Send(Frame::BackupLost { reason, .. }) => format!("send BACKUP_LOST({reason:?})"),
        Action::Send(frame) => format!("send {}", frame.name()),
        Action::Report(report) => {
            let text = format!("{report:?}");
            format!("report {}", text.split(['(', ' ']).next().unwrap_or_default())
        }
        other => {
            let text = format!("{other:?}");
            text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
        }
    }
}

/// Every state against every event. "-" is: nothing happens.
fn table() -> String {
    let mut out = String::from("| state | event | next | actions |\n|---|---|---|---|\n");
    let without = rows(usual);
    out += &without.concat();
    out += "\nWith a witness whose record is agreed, only what differs:\n\n| state | event | next | actions |\n|---|---|---|---|\n";
    let with = rows(|state| machine_in(state, policy(true, OnPrimaryLoss::Wait)));
    out += &with.into_iter().filter(|row| !without.contains(row)).collect::<String>();
    out
}

fn rows(machine_in: impl Fn(State) -> Machine) -> Vec<String> {
    let mut rows = Vec::new();
    for state in STATES {
        for (event_name, event) in events() {
            let mut machine = machine_in(state);
            let actions = machine.step(event);
            let next = machine.state();
            let list: Vec<_> = actions.iter().map(name).collect();
            let list = if list.is_empty() { "-".to_owned() } else { list.join(", ") };
            let next = if next == state { "same".to_owned() } else { format!("**{next:?}**") };
            rows.push(format!("| {state:?} | {event_name} | {next} | {list} |\n"));
        }
    }
    rows
}

#[test]
fn table_in_the_protocol_document_is_true() {
    const BEGIN: &str = "<!-- backup table: begin -->\n";
    const END: &str = "<!-- backup table: end -->";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("docs/protocol.md has a place for the table");
    let (kept, after) = rest.split_once(END).expect("the table's end is marked");
    let now = table();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, format!("{before}{BEGIN}{now}{END}{after}")).unwrap();
        return;
    }
    assert!(kept == now, "docs/protocol.md differs from the code; read the change, then run with BLESS=1:\n{now}");
}

/// What must hold in every pair, whatever the table says.
#[test]
fn rules_hold_in_every_state_for_every_event() {
    for witness in [false, true] {
        for loss in [OnPrimaryLoss::Wait, OnPrimaryLoss::Activate] {
            for state in STATES {
                if claims(state) && !witness {
                    continue;
                }
                for (event_name, event) in events() {
                    check_pair(state, event_name, &event, &policy(witness, loss));
                }
            }
        }
    }
}

fn check_pair(state: State, event_name: &str, event: &Event, policy: &Policy) {
    let pair = format!("{state:?} on {event_name} with {policy:?}");
    // Under a policy that activates by itself some states are passed on the way; they are reached without it here.
    let mut machine = machine_in(state, Policy { on_primary_loss: OnPrimaryLoss::Wait, ..policy.clone() });
    machine.policy = policy.clone();
    let machine_token = machine.token();
    let actions = machine.step(event.clone());
    let names: Vec<_> = actions.iter().map(name).collect();
    let acks = actions.iter().any(|a| matches!(a, Action::Send(Frame::Ack { .. })));
    assert!(!acks || matches!(state, State::Syncing | State::Armed), "R2: an acknowledgement in {pair}");
    let finishes = actions.iter().any(|a| matches!(a, Action::FinishCopy { .. }));
    if finishes {
        assert!(matches!(state, State::Armed | State::Waiting), "R4: {pair}");
        let handed =
            matches!(event, Event::Frame(Frame::Handover { epoch: Epoch(1), token }) if *token == machine_token);
        let operator = *event == Event::OperatorFailover { primary_is_off: true };
        let asked = matches!(event, Event::OperatorFailover { .. }) && policy.witness;
        let by_itself =
            *event == Event::PrimarySuspect && !policy.witness && policy.on_primary_loss == OnPrimaryLoss::Activate;
        assert!(operator || asked || by_itself || handed, "R9: {pair}");
    }
    if actions.contains(&Action::Go) {
        let alone = matches!(state, State::Claiming | State::Confirming) && *event == Event::AssumeAlone;
        let won = state == State::Confirming && *event == Event::StillMine || alone;
        let without = state == State::Activating && *event == Event::CopyReady && !policy.witness;
        assert!(won || without, "R3: {pair}");
    }
    if matches!(state, State::Active | State::Starting) && actions.contains(&Action::DestroyCopy) {
        assert!(
            state == State::Starting && matches!(event, Event::ReceiverDied(_)),
            "a started copy is destroyed: {pair}"
        );
    }
    if state == State::Active && matches!(event, Event::Frame(_)) {
        assert_eq!(names, ["send SUPERSEDED"], "{pair}");
    }
    if names.contains(&"send STOPPED".to_owned()) {
        assert!(
            matches!(state, State::Discarding | State::Forfeiting | State::Discarded),
            "STOPPED before the copy is gone: {pair}"
        );
    }
    let closes = matches!(event, Event::LinkClosed(_));
    if closes && state != State::Syncing {
        assert!(!actions.contains(&Action::DestroyCopy), "R9: {pair}");
    }
}

#[test]
fn the_activated_state_is_that_of_the_newest_whole_epoch() {
    let mut machine = machine_in(State::Armed, policy(false, OnPrimaryLoss::Wait));
    run(&mut machine, frames(3, true));
    // Epoch 3 is whole but not acknowledged; epoch 4 is torn.
    run(&mut machine, frames(4, true).into_iter().take(3));
    machine.step(Event::PrimarySuspect);
    let actions = machine.step(Event::OperatorFailover { primary_is_off: true });
    let Some(Action::FinishCopy { epoch, state }) = actions.last() else { panic!("{actions:?}") };
    assert_eq!(*epoch, Epoch(3));
    assert_eq!(state[0].body, part(3).data);
    assert_eq!(machine.step(Event::Alive(Epoch(3))), [], "F9: nothing is acknowledged after the claim began");
}

#[test]
fn an_acknowledgement_waits_for_the_receiver_to_catch_up() {
    let mut machine = machine_in(State::Syncing, policy(false, OnPrimaryLoss::Wait));
    let asks = |actions: &Actions| actions.iter().any(|a| matches!(a, Action::CheckAlive(_)));
    assert!(asks(&run(&mut machine, frames(1, true))), "one older epoch may be behind");
    machine.step(Event::Alive(Epoch(1)));
    assert!(!asks(&run(&mut machine, frames(2, true))), "two may not (F11)");
    assert_eq!(machine.step(Event::Drained(Epoch(0))), [Action::CheckAlive(Epoch(2))]);
    let actions = machine.step(Event::Alive(Epoch(2)));
    let (backlog_epochs, backlog_bytes) = (2, 2 * 4104);
    assert_eq!(actions, [Action::Send(Frame::Ack { epoch: Epoch(2), backlog_epochs, backlog_bytes })]);
}

#[test]
fn only_the_first_copy_passes_through_and_a_large_unarmed_epoch_does() {
    let mut machine = Machine::new(policy(false, OnPrimaryLoss::Wait));
    run(&mut machine, head());
    let begin = |epoch, armed| Event::Frame(Frame::EpochBegin { epoch: Epoch(epoch), armed });
    let pages = |epoch| Event::Frame(Frame::Pages { epoch: Epoch(epoch), batch: batch(epoch) });
    machine.step(begin(0, false));
    assert_eq!(machine.step(pages(0)), [Action::FeedPages(batch(0))]);
    run(&mut machine, frames(0, false));
    machine.step(begin(1, false));
    let fed: Vec<_> = (0..20).map(|_| machine.step(pages(1)).len()).collect();
    assert_eq!(fed.iter().sum::<usize>(), 20, "nothing is lost when the limit is passed");
    assert_eq!(fed[..15], [0; 15], "staged up to the limit");
    assert!(machine.passes_through());

    let mut machine = machine_in(State::Armed, policy(false, OnPrimaryLoss::Wait));
    let actions: Actions = (0..20).flat_map(|_| machine.step(pages(2))).collect();
    assert!(!actions.iter().any(|a| matches!(a, Action::FeedPages(_))), "R2");
    assert!(matches!(&actions[0], Action::Send(Frame::BackupLost { reason: LostReason::Memory, .. })));
    assert_eq!(machine.state(), State::Waiting);
}

#[test]
fn a_damaged_epoch_is_never_fed_and_the_good_copy_is_kept() {
    for damage in 0..4 {
        let mut machine = machine_in(State::Armed, policy(false, OnPrimaryLoss::Activate));
        let mut bad = end(3, true);
        match damage {
            0 => bad.digest.0 ^= 1,
            1 => bad.pages += 1,
            2 => bad.records += 1,
            _ => bad.bytes += 1,
        }
        let mut events = frames(3, true);
        events.pop();
        run(&mut machine, events);
        let actions = machine.step(Event::Frame(Frame::EpochEnd(bad)));
        assert!(!actions.iter().any(|a| matches!(a, Action::FeedPages(_) | Action::FeedMark(_))));
        assert!(matches!(&actions[0], Action::Send(Frame::BackupLost { reason: LostReason::Digest, .. })));
        assert_eq!(machine.state(), State::Waiting);
        machine.step(Event::LinkClosed("we closed it".into()));
        let actions = machine.step(Event::PrimarySuspect);
        assert!(
            !actions.iter().any(|a| matches!(a, Action::FinishCopy { .. })),
            "the primary was told and goes on alone"
        );
    }
}
