//! Every state against every intent, from every point of view.

use super::record::{Attempt, Host, HostId, RECORD_VERSION, Record, RecordKey, RecordState as S, Watermark};
use super::rules::{Intent, Refusal, Step, step};
use crate::ids::{Generation, Nonce, ProtectionId};

const STATES: [S; 6] = [S::Armed, S::Claimed, S::Active, S::Forfeited, S::Stopped, S::HandedTo];

pub(super) fn host(n: u128, name: &str) -> Host {
    Host { id: HostId(uuid::Uuid::from_u128(n)), name: name.into() }
}

pub(super) fn nonce(n: u128) -> Nonce {
    Nonce(uuid::Uuid::from_u128(n))
}

pub(super) fn attempt(n: u128) -> Attempt {
    Attempt(uuid::Uuid::from_u128(n))
}

pub(super) fn key(generation: u64) -> RecordKey {
    RecordKey { generation: Generation(generation), nonce: nonce(generation.into()) }
}

pub(super) const DOMAIN: ProtectionId = ProtectionId::from_u128(77);

/// Generation 5, owner a, peer b, written in attempt 1.
pub(super) fn record(state: S) -> Record {
    Record {
        version: RECORD_VERSION,
        uuid: DOMAIN,
        generation: Generation(5),
        nonce: nonce(5),
        state,
        owner: host(1, "a"),
        peer: host(2, "b"),
        attempt: attempt(1),
    }
}

fn intents(me: &Host) -> Vec<Intent> {
    let peer = if me.is(&host(2, "b")) { host(1, "a") } else { host(2, "b") };
    vec![
        Intent::Arm { at_least: Generation(1), nonce: nonce(9), peer: peer.clone(), peer_has_seen: false },
        Intent::Accept(key(5)),
        Intent::Claim(key(5)),
        Intent::Activate(key(5)),
        Intent::Forfeit(key(5)),
        Intent::Stop(key(5)),
        Intent::HandOver(key(5)),
        Intent::Force { nonce: nonce(9), peer },
        Intent::Look,
    ]
}

/// `state(owner/peer)gGENERATION` of a swap, else a word.
fn short(step: &Step) -> String {
    match step {
        Step::Swap(r) => {
            assert_eq!(r.attempt, attempt(2), "every change carries its own attempt");
            assert_eq!((r.uuid, r.version), (DOMAIN, RECORD_VERSION));
            assert_eq!(
                r.nonce,
                nonce(if r.generation == Generation(5) { 5 } else { 9 }),
                "a new generation has a new nonce"
            );
            format!("{:?}({}/{})g{}", r.state, r.owner, r.peer, r.generation)
        }
        Step::Won(_) => "won".into(),
        Step::Lost(_) => "lost".into(),
        Step::Seen(_) => "seen".into(),
        Step::Refuse(Refusal::Absent) => "absent".into(),
        Step::Refuse(Refusal::RolledBack(_)) => "rolled-back".into(),
        Step::Refuse(Refusal::OtherRecord(_)) => "other".into(),
        Step::Refuse(Refusal::WrongState(_)) => "wrong".into(),
        Step::Refuse(r) => panic!("not of the rules: {r}"),
    }
}

fn run(me: &Host, intent: &Intent, found: Option<&Record>) -> String {
    short(&step(me, DOMAIN, intent, attempt(2), found, &Watermark { key: Some(key(5)), position: None }))
}

fn table(me: &Host) -> String {
    let mut text = String::new();
    for intent in intents(me) {
        text += &format!("{:9}", intent.name());
        for state in STATES {
            text += &format!(" | {}", run(me, &intent, Some(&record(state))));
        }
        text += "\n";
    }
    text
}

fn check(got: &str, want: &str) {
    let clean =
        |t: &str| t.trim().lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
    assert_eq!(clean(got), clean(want), "\n{got}");
}

#[test]
fn the_owner() {
    check(
        &table(&host(1, "renamed")).replace("renamed", "a"),
        "arm       | Armed(a/b)g6   | Armed(a/b)g6     | Armed(a/b)g6   | wrong         | Armed(a/b)g6    | wrong
         accept    | wrong          | wrong            | wrong          | wrong         | wrong           | wrong
         claim     | Claimed(a/b)g5 | Claimed(a/b)g5   | Active(a/b)g5  | lost          | Claimed(a/b)g5  | Claimed(a/b)g5
         activate  | wrong          | Active(a/b)g5    | won            | wrong         | wrong           | wrong
         forfeit   | wrong          | Forfeited(a/b)g5 | wrong          | won           | wrong           | wrong
         stop      | Stopped(a/b)g5 | wrong            | Stopped(a/b)g5 | wrong         | won             | wrong
         hand over | HandedTo(a/b)g5 | wrong            | wrong          | wrong         | wrong           | won
         force     | Claimed(a/b)g6 | Claimed(a/b)g6   | Claimed(a/b)g6 | Claimed(a/b)g6 | Claimed(a/b)g6  | Claimed(a/b)g6
         look      | seen           | seen             | seen           | seen          | seen            | seen",
    );
}

#[test]
fn the_peer() {
    check(
        &table(&host(2, "b")),
        "arm       | lost           | lost           | lost           | lost           | lost           | lost
         accept    | won            | lost           | lost           | lost           | lost           | lost
         claim     | Claimed(b/a)g5 | lost           | lost           | Claimed(b/a)g5 | lost           | Claimed(b/a)g5
         activate  | lost           | lost           | lost           | lost           | lost           | lost
         forfeit   | Armed(a/b)g5   | lost           | lost           | Forfeited(a/b)g5 | lost         | HandedTo(a/b)g5
         stop      | lost           | lost           | lost           | lost           | lost           | lost
         hand over | lost           | lost           | lost           | lost           | lost           | lost
         force     | Claimed(b/a)g6 | Claimed(b/a)g6 | Claimed(b/a)g6 | Claimed(b/a)g6 | Claimed(b/a)g6 | Claimed(b/a)g6
         look      | seen           | seen           | seen           | seen           | seen           | seen",
    );
}

#[test]
fn a_stranger_gets_nothing_but_by_force() {
    let stranger = host(3, "a"); // the same name does not help
    for intent in intents(&stranger) {
        for state in STATES {
            let want = match intent {
                Intent::Force { .. } => "Claimed(a/b)g6",
                Intent::Look => "seen",
                _ => "lost",
            };
            assert_eq!(run(&stranger, &intent, Some(&record(state))), want, "{} {state}", intent.name());
        }
    }
}

#[test]
fn an_absent_record_allows_the_first_arming_and_force() {
    let me = host(1, "a");
    for intent in intents(&me) {
        let seen = run(&me, &intent, None);
        let never = short(&step(&me, DOMAIN, &intent, attempt(2), None, &Watermark::default()));
        match intent {
            Intent::Force { .. } => assert_eq!((seen.as_str(), never.as_str()), ("Claimed(a/b)g6", "Claimed(a/b)g1")),
            Intent::Arm { .. } => assert_eq!((seen.as_str(), never.as_str()), ("absent", "Armed(a/b)g1")),
            _ => assert_eq!((seen.as_str(), never.as_str()), ("absent", "absent"), "{}", intent.name()),
        }
    }
    let reinstalled = Intent::Arm { at_least: Generation(1), nonce: nonce(9), peer: host(2, "b"), peer_has_seen: true };
    assert_eq!(short(&step(&me, DOMAIN, &reinstalled, attempt(2), None, &Watermark::default())), "absent");
}

#[test]
fn another_generation_or_nonce_is_never_acted_on() {
    for (me, newer) in [(host(1, "a"), "wrong"), (host(2, "b"), "lost"), (host(3, "c"), "lost")] {
        for make in [Intent::Accept, Intent::Claim, Intent::Activate, Intent::Forfeit, Intent::Stop, Intent::HandOver] {
            for state in STATES {
                let run = |key| run(&me, &make(key), Some(&record(state)));
                assert_eq!(run(key(6)), "rolled-back", "asked for a newer one than the witness knows");
                // Armed or forced by this host, which crashed before it knew.
                let want = match (state, make(key(4))) {
                    _ if newer == "lost" => "lost",
                    (S::Armed | S::Claimed | S::Stopped, Intent::Claim(_)) => "Claimed(a/b)g5",
                    (S::Active, Intent::Claim(_)) => "Active(a/b)g5",
                    (S::Armed | S::Active, Intent::Stop(_)) => "Stopped(a/b)g5",
                    _ => newer,
                };
                assert_eq!(run(key(4)), want, "the record has moved on");
                let forged = RecordKey { nonce: nonce(99), ..key(5) };
                assert_eq!(run(forged), "other", "same generation, other nonce");
            }
        }
    }
}

#[test]
fn a_host_cannot_be_its_own_peer() {
    let me = host(1, "a");
    let twin = host(1, "b");
    for intent in [
        Intent::Arm { at_least: Generation(1), nonce: nonce(9), peer: twin.clone(), peer_has_seen: false },
        Intent::Force { nonce: nonce(9), peer: twin.clone() },
    ] {
        let step = step(&me, DOMAIN, &intent, attempt(2), None, &Watermark::default());
        assert_eq!(step, Step::Refuse(Refusal::SameHost));
    }
}

#[test]
fn a_new_generation_is_above_everything_seen() {
    let me = host(1, "a");
    let arm = |at_least| Intent::Arm {
        at_least: Generation(at_least),
        nonce: nonce(9),
        peer: host(2, "b"),
        peer_has_seen: false,
    };
    let stopped = record(S::Stopped);
    let of = |intent: &Intent, watermark: u64| {
        let watermark = Watermark { key: Some(key(watermark)), position: None };
        match step(&me, DOMAIN, intent, attempt(2), Some(&stopped), &watermark) {
            Step::Swap(r) => r.generation.0,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(of(&arm(1), 5), 6);
    assert_eq!(of(&arm(40), 5), 40);
    assert_eq!(of(&arm(6), 5), 6);
    assert_eq!(of(&Intent::Force { nonce: nonce(9), peer: host(2, "b") }, 8), 9, "rolled back below what was seen");
}

#[test]
fn the_stored_value_is_read_back_and_nothing_else_is() {
    let r = record(S::HandedTo);
    let json = r.to_json();
    assert!(json.contains(r#""state":"handed-to""#) && json.starts_with(r#"{"version":1,"#), "{json}");
    assert_eq!(Record::from_json(DOMAIN, json.as_bytes()), Ok(r));
    let bad = |text: &str| Record::from_json(DOMAIN, text.as_bytes()).unwrap_err();
    assert!(bad(&json.replace("\"version\":1", "\"version\":2")).contains("version 2"));
    assert!(bad(&json.replace("\"version\":1", "\"version\":1,\"more\":0")).contains("more"));
    assert!(bad(&json[..40]).contains("not ours"));
    assert!(bad("").contains("not ours"));
    assert!(Record::from_json(ProtectionId::from_u128(78), json.as_bytes()).unwrap_err().contains("another domain"));
}
