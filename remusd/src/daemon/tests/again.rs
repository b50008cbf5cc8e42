//! Protection that the daemon begins by itself: again after a loss, and anew after an audit.

use super::*;

const HOSTB: &str = "hostb";

fn target() -> Target {
    Target::Host { host: HOSTB.into(), ssh: None }
}

impl Fixture {
    fn reprotect(&self) {
        self.daemon.reprotect(WEB, "web", target(), ProtectOptions::default());
    }

    fn resync(&self) {
        self.daemon.resync((domain(), target(), ProtectOptions::default()));
    }

    fn job(&self) -> crate::ops::operation::Job {
        self.daemon.operations.jobs().pop().expect("a job")
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_away_is_tried_until_it_answers_as_one_job() {
    let fixture = Fixture::new().await;
    for _ in 0..3 {
        fixture.fails(ErrorCode::Peer, "no route");
    }
    let script = fixture.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    let start = tokio::time::Instant::now();
    fixture.reprotect();
    let job = fixture.job();
    assert_eq!((job.kind, job.initiator, job.abortable), (OperationKind::Protect, None, true));
    fixture.hears(EventKind::JobCompleted).await;
    assert_eq!(*fixture.asked.lock().unwrap(), 4);
    // After 2, 4, 8 and 16 seconds.
    assert_eq!(start.elapsed().as_secs(), 30);
    assert_eq!(fixture.events(&[EventKind::Unprotected]).len(), 1, "the same trouble is told once");
    assert_eq!(fixture.ends(), [(EventKind::JobCompleted, OperationKind::Protect, None)]);
}

#[tokio::test(start_paused = true)]
async fn trying_again_ends_when_told_so_and_when_it_cannot_help() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "no route");
    fixture.reprotect();
    fixture.hears(EventKind::Unprotected).await;
    let answer = fixture.daemon.abort_job(fixture.job().id, true).await.unwrap();
    assert_eq!(answer["outcome"], "cancelled");
    let tries = *fixture.asked.lock().unwrap();
    tokio::time::sleep(LONGEST * 3).await;
    assert_eq!(*fixture.asked.lock().unwrap(), tries);

    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Conflict, "it is protected already");
    fixture.reprotect();
    fixture.hears(EventKind::JobFailed).await;
    assert_eq!(*fixture.asked.lock().unwrap(), 1);

    // As an operator who wants it unprotected says it.
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "no route");
    fixture.reprotect();
    fixture.hears(EventKind::Unprotected).await;
    let begun = fixture.daemon.begin_unprotect("web", ROOT, None).await.unwrap();
    assert!(begun.answer().await.is_ok());
    assert_eq!(fixture.ends()[0].0, EventKind::JobCancelled);
}

const LONGEST: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn a_restarted_daemon_goes_on_trying_until_it_is_settled() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "no route");
    fixture.reprotect();
    fixture.hears(EventKind::Unprotected).await;
    fixture.daemon.shut_down().await;
    assert_eq!(fixture.daemon.state.agains().0.len(), 1, "the daemon's end settles nothing");

    // Another run of the daemon on the same state.
    let next = Fixture::new().await;
    next.daemon.state.put_again(&fixture.daemon.state.agains().0[0]).unwrap();
    let script = next.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    next.daemon.resume_protecting();
    next.daemon.resume_protecting();
    assert_eq!(next.daemon.operations.jobs().len(), 1, "once is enough");
    next.hears(EventKind::JobCompleted).await;
    assert_eq!((*next.asked.lock().unwrap(), next.daemon.state.agains().0), (1, vec![]));

    // What cannot be, and what somebody does not want, is not tried again.
    let next = Fixture::new().await;
    next.fails(ErrorCode::NotFound, "no such domain");
    next.reprotect();
    next.hears(EventKind::JobFailed).await;
    assert_eq!(next.daemon.state.agains().0, vec![]);
}

#[tokio::test]
async fn a_wrong_copy_is_made_anew_with_beginning_progress_and_end() {
    let fixture = Fixture::new().await;
    let script = fixture.comes_to_be();
    fixture.resync();
    assert_eq!(fixture.job().kind, OperationKind::Resync);
    fixture.hears(EventKind::ResyncStarted).await;
    script.sent.send_modify(|sent| (sent.pages, sent.bytes) = (1000, 70 << 20));
    assert!(fixture.hears(EventKind::ResyncProgress).await.contains("70 MiB"));
    script.sent.send_modify(|sent| sent.bytes = 100 << 20);
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    fixture.hears(EventKind::JobCompleted).await;
    let kinds = [EventKind::ResyncStarted, EventKind::ResyncProgress, EventKind::ResyncEnded, EventKind::Unprotected];
    let told: Vec<_> = fixture.events(&kinds).iter().map(|event| event.kind).collect();
    assert_eq!(told, kinds[..3], "progress again only at twice as much");

    // What differs again at once is not mended by another copy.
    fixture.resync();
    fixture.hears(EventKind::Unprotected).await;
    assert_eq!(fixture.ends().len(), 1);
}

#[tokio::test]
async fn a_copy_that_cannot_be_made_anew_leaves_the_guest_unprotected_and_says_so() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "hostb is gone");
    fixture.resync();
    assert!(fixture.hears(EventKind::Unprotected).await.contains("hostb is gone"));
    assert!(fixture.hears(EventKind::ResyncEnded).await.contains("hostb is gone"));
    assert!(!fixture.hears(EventKind::JobFailed).await.is_empty());
    assert_eq!(fixture.ends(), [(EventKind::JobFailed, OperationKind::Resync, None)]);
}
