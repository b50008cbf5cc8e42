//! Jobs that settle who owns a guest.

use super::*;
use crate::link::{RecordKey, Token};
use crate::state::{PrimaryRecord, STATE_VERSION};

fn undecided() -> State {
    State::Holding(StopWhy::Failed("the backup is silent".into()))
}

#[tokio::test]
async fn an_operators_word_completes_once_the_guest_goes_on() {
    let fixture = Fixture::new().await;
    let mut script = fixture.protected().await;
    let none = fixture.daemon.begin_assume_alone("web", ROOT, None).await.err().unwrap();
    assert_eq!(none.code, ErrorCode::Conflict, "nothing waits for it");
    assert!(fixture.daemon.operations.jobs().is_empty());
    script.state(undecided(), false);
    let begun = fixture.daemon.begin_assume_alone("web", ROOT, Some("a".into())).await.unwrap().unwrap();
    assert!(matches!(soon(script.orders.recv()).await, Some(Order::AssumeAlone)));
    let refused = fixture.daemon.abort_job(begun.id, false).await.unwrap_err();
    assert!(refused.message.contains("cannot be taken back"), "{refused}");
    script.state(State::CleaningUp(Outcome::Alone("said so".into())), false);
    fixture.hears(EventKind::OperationComplete).await;
    let kind = OperationKind::AssumeAlone;
    let tag = Some("a".to_owned());
    assert_eq!(fixture.ends(), [(EventKind::JobCompleted, kind, None), (EventKind::OperationComplete, kind, tag)]);
}

#[tokio::test(start_paused = true)]
async fn a_word_that_only_the_witness_could_carry_out_fails_in_time() {
    let fixture = Fixture::new().await;
    let script = fixture.protected().await;
    script.state(State::Yielding(StopWhy::Failed("lost".into())), false);
    let begun = fixture.daemon.begin_assume_alone("web", ROOT, None).await.unwrap().unwrap();
    let error = begun.answer().await.unwrap_err();
    assert!(error.message.contains("still waits"), "{error}");
    assert_eq!(fixture.ends(), [(EventKind::JobFailed, OperationKind::AssumeAlone, None)]);
}

#[tokio::test]
async fn a_protection_that_ends_meanwhile_answers_with_its_end() {
    let fixture = Fixture::new().await;
    let script = fixture.protected().await;
    script.state(undecided(), false);
    let begun = fixture.daemon.begin_assume_alone("web", ROOT, None).await.unwrap().unwrap();
    script.end(Outcome::Superseded("hostb runs it".into()));
    drop(script);
    assert_eq!(soon(begun.answer()).await.unwrap_err().code, ErrorCode::Conflict);
}

#[tokio::test]
async fn a_word_about_a_copy_that_waits_for_nobody_is_refused_by_the_copy() {
    let fixture = Fixture::with(true).await;
    let begun = fixture.daemon.begin_assume_alone(fixture.backup.name, ROOT, None).await.unwrap().unwrap();
    assert_eq!(soon(begun.answer()).await.unwrap_err().code, ErrorCode::Conflict);
    assert!(fixture.daemon.begin_assume_alone("db", ROOT, None).await.unwrap().is_none());
}

/// What a crash has left of a protection with a witness that never answers.
fn record(dir: &std::path::Path) -> PrimaryRecord {
    let script = dir.join("silent");
    std::fs::write(&script, "#!/bin/sh\nexit 2\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let witness = Some(format!("script:{}", script.display()));
    PrimaryRecord {
        version: STATE_VERSION,
        uuid: WEB,
        name: "web".into(),
        domid: DomId(3),
        generation: Generation(1),
        nonce: crate::ids::Nonce::random(),
        armed: true,
        superseded: false,
        token: Token::Witness(RecordKey { generation: Generation(1), nonce: crate::ids::Nonce::random() }),
        handed_over: false,
        frozen: false,
        target: Target::Host { host: "hostb".into(), ssh: None },
        options: ProtectOptions { witness, ..ProtectOptions::default() },
        devices: Vec::new(),
        vifs: Vec::new(),
        config: "{}".into(),
        monitor: false,
        helper: None,
    }
}

#[tokio::test]
async fn a_recovery_that_waits_is_one_job_that_a_newer_one_replaces_and_the_end_of_the_daemon_ends() {
    let fixture = Fixture::new().await;
    // Nothing runs here: the guest need not be resumed, only its owner found.
    fixture.hypervisor.remove(DomId(3));
    let record = record(fixture._dir.path());
    fixture.daemon.state.put_primary(&record).unwrap();
    let first = fixture.daemon.begin_recover(record.clone(), false, None, None).await.unwrap();
    let job = fixture.daemon.operations.jobs().pop().unwrap();
    assert_eq!((job.kind, job.state, job.abortable), (OperationKind::Recover, JobState::Running, true));
    let second = soon(fixture.daemon.begin_recover(record, false, Some(ROOT), None)).await.unwrap();
    assert_eq!(soon(first.answer()).await.unwrap_err().code, ErrorCode::Cancelled);
    assert_eq!(fixture.daemon.operations.jobs().len(), 2);
    soon(fixture.daemon.shut_down()).await;
    let error = soon(second.answer()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Cancelled);
    assert!(error.message.contains("stays sealed"), "{error}");
    assert_eq!(fixture.daemon.state.primaries().0.len(), 1, "the next start tries again");
    assert_eq!(fixture.ends(), vec![(EventKind::JobCancelled, OperationKind::Recover, None); 2]);
}
