//! The client, step by step: what it does with each answer.

use super::client::{CasReply, Client, Effect, Input, Outcome, ReadError, RequestId};
use super::memory::Table;
use super::record::{Record, RecordState as S, Versioned, Watermark};
use super::rules::{Intent, Refusal};
use super::rules_tests::{DOMAIN, attempt, host, key, nonce, record};
use crate::ids::Generation;

fn client(n: u128, seen: Option<u64>) -> Client {
    let watermark = Watermark { key: seen.map(key), position: None };
    Client::new(host(n, if n == 1 { "a" } else { "b" }), DOMAIN, watermark)
}

/// A table that holds `record`.
fn table(record: Option<&Record>) -> Table {
    let mut table = Table::new("t");
    if let Some(r) = record {
        let there = table.read(DOMAIN);
        table.cas(DOMAIN, &there, r).unwrap();
    }
    table
}

fn read(effects: &[Effect]) -> RequestId {
    match effects {
        [Effect::Read(r)] => *r,
        other => panic!("{other:?}"),
    }
}

fn cas(effects: &[Effect]) -> (RequestId, Versioned, Record) {
    match effects {
        [Effect::Cas { request, expected, new }] => (*request, (**expected).clone(), (**new).clone()),
        other => panic!("{other:?}"),
    }
}

fn wait(effects: &[Effect]) -> RequestId {
    match effects {
        [Effect::Wait { request, .. }] => *request,
        other => panic!("{other:?}"),
    }
}

/// The outcome; the watermark is saved before it.
fn done(effects: &[Effect]) -> Outcome {
    match effects {
        [.., Effect::Done(outcome)] => {
            for (i, e) in effects.iter().enumerate() {
                match e {
                    Effect::SaveWatermark(_) => assert_eq!(i, effects.len() - 2),
                    Effect::Alarm(_) | Effect::Done(_) => {}
                    other => panic!("{other:?} among the last effects"),
                }
            }
            outcome.clone()
        }
        other => panic!("{other:?}"),
    }
}

fn alarmed(effects: &[Effect]) -> bool {
    effects.iter().any(|e| matches!(e, Effect::Alarm(_)))
}

/// Carries everything out at once, without faults.
fn run(client: &mut Client, table: &mut Table, intent: Intent, n: u128) -> Outcome {
    let mut effects = client.start(intent, attempt(n)).unwrap();
    loop {
        effects = match &effects[..] {
            [Effect::Read(r)] => client.on(Input::Read(*r, Ok(table.read(DOMAIN)))),
            [Effect::Cas { request, expected, new }] => {
                let reply = table.cas(DOMAIN, expected, new).map_or(CasReply::Conflict, CasReply::Applied);
                client.on(Input::Cas(*request, reply))
            }
            other => return done(other),
        };
    }
}

fn won(outcome: Outcome) -> Record {
    match outcome {
        Outcome::Won(r) => *r,
        other => panic!("{other:?}"),
    }
}

fn arm() -> Intent {
    Intent::Arm { at_least: Generation(5), nonce: nonce(5), peer: host(2, "b"), peer_has_seen: false }
}

#[test]
fn a_life_of_a_protection() {
    let (mut table, mut a, mut b) = (Table::new("t"), client(1, None), client(2, None));
    let armed = won(run(&mut a, &mut table, arm(), 10));
    assert_eq!((armed.state, armed.key()), (S::Armed, key(5)));
    won(run(&mut b, &mut table, Intent::Accept(key(5)), 11));
    assert_eq!(won(run(&mut b, &mut table, Intent::Claim(key(5)), 12)).owner, host(2, "b"));
    assert!(matches!(run(&mut a, &mut table, Intent::Claim(key(5)), 13), Outcome::Lost(r) if r.state == S::Claimed));
    assert_eq!(won(run(&mut b, &mut table, Intent::Forfeit(key(5)), 14)).state, S::Forfeited);
    assert!(matches!(run(&mut a, &mut table, Intent::Look, 15), Outcome::Seen(r) if r.state == S::Forfeited));
    won(run(&mut a, &mut table, Intent::Claim(key(5)), 16));
    assert_eq!(won(run(&mut a, &mut table, Intent::Activate(key(5)), 17)).state, S::Active);
    let again = Intent::Arm { at_least: Generation(1), nonce: nonce(6), peer: host(2, "b"), peer_has_seen: true };
    assert_eq!(won(run(&mut a, &mut table, again, 18)).key(), key(6));
    assert!(matches!(run(&mut b, &mut table, Intent::Claim(key(5)), 19), Outcome::Lost(_)), "the old copy is stale");
    won(run(&mut a, &mut table, Intent::HandOver(key(6)), 20));
    won(run(&mut b, &mut table, Intent::Claim(key(6)), 21));
    assert!(matches!(run(&mut a, &mut table, Intent::Claim(key(6)), 22), Outcome::Lost(_)));
    won(run(&mut b, &mut table, Intent::Activate(key(6)), 23));
    assert_eq!(won(run(&mut b, &mut table, Intent::Stop(key(6)), 24)).state, S::Stopped);
}

#[test]
fn a_lost_reply_is_recognised_as_mine() {
    let mut table = table(Some(&record(S::Armed)));
    let mut b = client(2, Some(5));
    let r = read(&b.start(Intent::Claim(key(5)), attempt(2)).unwrap());
    let (c, expected, new) = cas(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    assert_eq!(b.pending(), Some((&Intent::Claim(key(5)), true)));
    table.cas(DOMAIN, &expected, &new).unwrap();
    let r = read(&b.on(Input::Cas(c, CasReply::Unknown("timeout".into()))));
    let r = wait(&b.on(Input::Read(r, Err(ReadError::Unavailable("timeout".into())))));
    let r = read(&b.on(Input::Retry(r)));
    assert_eq!(won(done(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))))), new);
    assert_eq!(b.pending(), None);
}

#[test]
fn a_lost_request_is_sent_again_after_a_wait_and_a_late_one_is_mine() {
    let mut table = table(Some(&record(S::Armed)));
    let mut b = client(2, Some(5));
    let r = read(&b.start(Intent::Claim(key(5)), attempt(2)).unwrap());
    let (c, expected, new) = cas(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    let r = read(&b.on(Input::Cas(c, CasReply::Unknown("timeout".into()))));
    let r = wait(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    let r = read(&b.on(Input::Retry(r)));
    let (c2, expected2, new2) = cas(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    assert_eq!((&expected2.record, &new2), (&expected.record, &new), "the same value, so that either counts");
    table.cas(DOMAIN, &expected, &new).unwrap(); // the first one arrives after all
    assert_eq!(table.cas(DOMAIN, &expected2, &new2), None);
    assert_eq!(b.on(Input::Cas(c, CasReply::Conflict)), vec![], "an answer that is not awaited any more");
    let r = read(&b.on(Input::Cas(c2, CasReply::Conflict)));
    assert_eq!(won(done(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))))), new);
}

#[test]
fn a_late_claim_cannot_land_on_a_newer_generation() {
    let mut table = table(Some(&record(S::Armed)));
    let mut a = client(1, Some(5));
    let r = read(&a.start(Intent::Claim(key(5)), attempt(2)).unwrap());
    let (c, expected, new) = cas(&a.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    a.on(Input::Cas(c, CasReply::Unknown("timeout".into())));
    assert!(a.cancel().unwrap().sent);
    let armed = won(run(&mut a, &mut table, arm(), 3));
    assert_eq!(armed.generation, Generation(6));
    assert_eq!(table.cas(DOMAIN, &expected, &new), None, "hazard F8 b");
    assert_eq!(table.read(DOMAIN).record, Some(armed));
}

#[test]
fn after_a_restart_the_claim_is_written_anew_so_that_a_delayed_forfeit_fails() {
    let mut table = table(Some(&record(S::Claimed)));
    let delayed = (table.read(DOMAIN), Record { attempt: attempt(1), ..record(S::Forfeited) });
    let mut a = client(1, Some(5));
    assert_eq!(won(run(&mut a, &mut table, Intent::Claim(key(5)), 2)).attempt, attempt(2));
    assert_eq!(table.cas(DOMAIN, &delayed.0, &delayed.1), None);
}

#[test]
fn absent_and_rolled_back_and_another_store_refuse_with_an_alarm() {
    let mut table = table(Some(&record(S::Armed)));
    let backup = table.clone();
    let mut b = client(2, Some(5));
    assert!(matches!(run(&mut b, &mut table, Intent::Look, 2), Outcome::Seen(_)));
    let mut a = client(1, Some(5));
    won(run(&mut a, &mut table, Intent::HandOver(key(5)), 3));
    assert!(matches!(run(&mut b, &mut table, Intent::Look, 4), Outcome::Seen(_)));
    let wiped = Table::new("t");
    let mut elsewhere = Table::new("other");
    let there = elsewhere.read(DOMAIN);
    elsewhere.cas(DOMAIN, &there, &record(S::HandedTo)).unwrap();
    // Restored with its revision pushed up: the record's own gives it away.
    let mut bumped = backup.clone();
    for n in 0..9 {
        let domain = crate::ids::ProtectionId::from_u128(n);
        let there = bumped.read(domain);
        bumped.cas(domain, &there, &record(S::Stopped)).unwrap();
    }
    for (name, table) in [("older", &backup), ("wiped", &wiped), ("elsewhere", &elsewhere), ("bumped", &bumped)] {
        for intent in [Intent::Claim(key(5)), Intent::Activate(key(5)), arm(), Intent::Look] {
            let mut b = b.clone();
            let r = read(&b.start(intent.clone(), attempt(5)).unwrap());
            let effects = b.on(Input::Read(r, Ok(table.read(DOMAIN))));
            assert!(alarmed(&effects), "{name} {}", intent.name());
            match (name, done(&effects)) {
                ("elsewhere", Outcome::Refused(Refusal::OtherStore { .. })) => {}
                ("older" | "wiped" | "bumped", Outcome::Refused(Refusal::RolledBack(_))) => {}
                (_, other) => panic!("{name} {}: {other:?}", intent.name()),
            }
        }
    }
    // Deleted alone, revision intact.
    let absent = Versioned { record: None, position: table.position(0) };
    let r = read(&b.start(Intent::Claim(key(5)), attempt(6)).unwrap());
    let effects = b.on(Input::Read(r, Ok(absent)));
    assert!(alarmed(&effects));
    assert_eq!(done(&effects), Outcome::Refused(Refusal::Absent));
    // Force is the way out, above what was seen, and then the new store is the one that counts.
    let mut wiped = wiped;
    let forced = won(run(&mut b, &mut wiped, Intent::Force { nonce: nonce(6), peer: host(1, "a") }, 7));
    assert_eq!(forced.key(), key(6));
    assert_eq!(won(run(&mut b, &mut wiped, Intent::Activate(key(6)), 8)).state, S::Active);
}

#[test]
fn an_answer_of_another_store_to_the_swap_is_not_a_win() {
    let table = table(Some(&record(S::Armed)));
    let mut a = client(1, Some(5));
    let r = read(&a.start(Intent::Claim(key(5)), attempt(2)).unwrap());
    let (c, ..) = cas(&a.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    let effects = a.on(Input::Cas(c, CasReply::Applied(Table::new("other").position(2))));
    assert!(alarmed(&effects));
    assert!(matches!(done(&effects), Outcome::Refused(Refusal::OtherStore { .. })));
}

#[test]
fn a_forced_claim_stops_when_the_other_host_turns_out_to_be_alive() {
    let mut table = table(Some(&record(S::Armed)));
    let mut b = client(2, Some(5));
    let r = read(&b.start(Intent::Force { nonce: nonce(6), peer: host(1, "a") }, attempt(2)).unwrap());
    let (c, expected, new) = cas(&b.on(Input::Read(r, Ok(table.read(DOMAIN)))));
    won(run(&mut client(1, Some(5)), &mut table, Intent::Claim(key(5)), 3));
    assert_eq!(table.cas(DOMAIN, &expected, &new), None);
    let r = read(&b.on(Input::Cas(c, CasReply::Conflict)));
    let effects = b.on(Input::Read(r, Ok(table.read(DOMAIN))));
    assert!(alarmed(&effects));
    assert!(matches!(done(&effects), Outcome::Lost(r) if r.owner == host(1, "a")));
}

#[test]
fn a_slow_answer_is_not_taken_for_a_rollback_because_a_probe_was_faster() {
    let mut table = table(Some(&record(S::Armed)));
    let mut a = client(1, Some(5));
    assert!(matches!(run(&mut a, &mut table, Intent::Look, 2), Outcome::Seen(_)));
    let r = read(&a.start(Intent::Look, attempt(3)).unwrap());
    let slow = table.read(DOMAIN);
    let mut later = table.position(0);
    later.revision += 10;
    a.observed(&later);
    assert!(matches!(done(&a.on(Input::Read(r, Ok(slow.clone())))), Outcome::Seen(_)));
    let r = read(&a.start(Intent::Look, attempt(4)).unwrap());
    let refused = done(&a.on(Input::Read(r, Ok(slow))));
    assert!(matches!(refused, Outcome::Refused(Refusal::RolledBack(_))), "one that was asked later is: {refused:?}");
}

#[test]
fn the_backup_accepts_a_record_of_a_new_store_only_as_its_primary_names_it() {
    let mut old = table(Some(&record(S::Armed)));
    let mut b = client(2, Some(5));
    won(run(&mut b, &mut old, Intent::Accept(key(5)), 2));
    let mut new = Table::new("new");
    let there = new.read(DOMAIN);
    new.cas(DOMAIN, &there, &Record { generation: Generation(6), nonce: nonce(6), ..record(S::Armed) }).unwrap();
    assert!(matches!(run(&mut b, &mut new, Intent::Claim(key(6)), 3), Outcome::Refused(Refusal::OtherStore { .. })));
    let wrong = Intent::Accept(super::RecordKey { nonce: nonce(7), ..key(6) });
    assert!(matches!(run(&mut b, &mut new, wrong, 4), Outcome::Refused(Refusal::OtherStore { .. })));
    won(run(&mut b, &mut new, Intent::Accept(key(6)), 5));
    won(run(&mut b, &mut new, Intent::Claim(key(6)), 6));
    assert!(matches!(run(&mut b, &mut old, Intent::Claim(key(5)), 7), Outcome::Refused(Refusal::OtherStore { .. })));
}

#[test]
fn one_intent_at_a_time_and_unreadable_is_refused() {
    let mut a = client(1, None);
    let r = read(&a.start(Intent::Look, attempt(2)).unwrap());
    assert_eq!(a.start(Intent::Look, attempt(3)).unwrap_err().0, "look");
    let effects = a.on(Input::Read(r, Err(ReadError::Unreadable("version 9".into()))));
    assert!(alarmed(&effects));
    assert_eq!(done(&effects), Outcome::Refused(Refusal::Unreadable("version 9".into())));
    let r = read(&a.start(Intent::Look, attempt(4)).unwrap());
    let effects = a.on(Input::Read(r, Ok(Table::new("t").read(DOMAIN))));
    assert!(!alarmed(&effects), "nothing was ever there");
    assert_eq!(done(&effects), Outcome::Refused(Refusal::Absent));
}
