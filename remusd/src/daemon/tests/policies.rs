//! Guests that are protected because a file says so.

use super::*;
use crate::api::TargetSpec;
use crate::policy::{self, Policy};

impl Fixture {
    fn policies(&self) -> std::path::PathBuf {
        self._dir.path().join("domains")
    }

    fn enable(&self, host: &str) {
        let target = TargetSpec { host: Some(host.into()), ..TargetSpec::default() };
        policy::write(&self.policies(), "web", &Policy { target, options: ProtectOptions::default() }).unwrap();
    }

    fn follow(&self) {
        self.daemon.follow_policies(self.policies());
    }

    fn tries(&self) -> u32 {
        *self.asked.lock().unwrap()
    }

    /// The policy's own job, after it has ended that often.
    async fn jobs_end(&self, kind: EventKind, times: usize) {
        let (past, mut live) = self.daemon.log.subscribe_to(Filter { kinds: vec![kind], ..Filter::default() });
        for _ in past.len()..times {
            soon(live.next()).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_with_a_policy_is_protected_when_the_daemon_starts_until_it_works() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "no route");
    fixture.fails(ErrorCode::Conflict, "still to be recovered");
    let script = fixture.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    fixture.enable("hostb");
    fixture.follow();
    fixture.jobs_end(EventKind::JobCompleted, 1).await;
    assert_eq!(fixture.tries(), 3);
    assert!(fixture.events(&[EventKind::Unprotected]).len() == 2, "each trouble is told");
}

#[tokio::test(start_paused = true)]
async fn a_guest_is_protected_when_it_starts_and_not_before_it_is_up() {
    let fixture = Fixture::new().await;
    let script = fixture.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    fixture.enable("hostb");
    fixture.hypervisor.remove(DomId(3));
    fixture.follow();
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 0, "it does not run");

    // As xl builds it: paused, then let go, which nobody tells.
    fixture.hypervisor.add(DomId(9), WEB, GuestType::Pvh);
    crate::xen::Hypervisor::pause(&*fixture.hypervisor, DomId(9)).await.unwrap();
    fixture.store.write("/local/domain/9/name", "web").await.unwrap();
    fixture.store.fire("@introduceDomain");
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 0, "it is not up");
    crate::xen::Hypervisor::unpause(&*fixture.hypervisor, DomId(9)).await.unwrap();
    fixture.jobs_end(EventKind::JobCompleted, 1).await;
    assert_eq!(fixture.tries(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_xl_migrates_here_is_protected_once_it_has_its_name() {
    let fixture = Fixture::new().await;
    let script = fixture.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    fixture.enable("hostb");
    fixture.store.write("/local/domain/3/name", "web--incoming").await.unwrap();
    fixture.follow();
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 0);
    fixture.store.write("/local/domain/3/name", "web").await.unwrap();
    fixture.jobs_end(EventKind::JobCompleted, 1).await;
    assert_eq!(fixture.tries(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_is_tried_once_until_somebody_enables_it_again() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Unsupported, "a PV guest");
    fixture.enable("hostb");
    fixture.follow();
    fixture.jobs_end(EventKind::JobFailed, 1).await;
    fixture.store.fire("@introduceDomain");
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 1);
    // Files that are read anew change nothing by themselves.
    assert!(fixture.daemon.reload(None).await.unwrap().contains("1 guests"));
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 1);
    fixture.daemon.reload(Some("web".into())).await.unwrap();
    fixture.jobs_end(EventKind::JobFailed, 2).await;
    assert_eq!(fixture.tries(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_ends_it_is_not_contradicted_and_a_lost_backup_is_tried_again() {
    let fixture = Fixture::new().await;
    let script = fixture.protected().await;
    fixture.enable("hostb");
    fixture.follow();
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 0, "it is protected already");
    script.end(Outcome::Stopped);
    fixture.daemon.log.publish(domain(), EventKind::Stopped, "as asked");
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), 0);

    let script = fixture.protected().await;
    fixture.fails(ErrorCode::Unsupported, "seen");
    script.end(Outcome::Alone("silence".into()));
    fixture.daemon.log.publish(domain(), EventKind::Unprotected, "silence");
    fixture.jobs_end(EventKind::JobFailed, 1).await;
    assert_eq!(fixture.tries(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_wrong_is_named_and_the_others_count() {
    let fixture = Fixture::new().await;
    let script = fixture.comes_to_be();
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    fixture.follow();
    fixture.enable("hostb");
    std::fs::write(fixture.policies().join("db.toml"), "[target]\nhots = \"b\"\n").unwrap();
    let error = fixture.daemon.reload(None).await.unwrap_err();
    assert!(error.message.contains("db.toml: line 2") && error.message.contains("NOT protected"), "{error}");
    fixture.jobs_end(EventKind::JobCompleted, 1).await;
}

#[tokio::test(start_paused = true)]
async fn another_policy_takes_the_place_of_a_try_under_way() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "no route");
    fixture.enable("hostb");
    fixture.follow();
    fixture.hears(EventKind::Unprotected).await;
    fixture.enable("hostc");
    fixture.daemon.reload(None).await.unwrap();
    fixture.jobs_end(EventKind::JobCancelled, 1).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let told = fixture.events(&[EventKind::Unprotected]);
    assert!(told.last().unwrap().detail.contains("towards hostc"), "{told:?}");
    policy::remove(&fixture.policies(), "web").unwrap();
    fixture.daemon.reload(None).await.unwrap();
    fixture.jobs_end(EventKind::JobCancelled, 2).await;
    let tries = fixture.tries();
    tokio::time::sleep(SOON).await;
    assert_eq!(fixture.tries(), tries);
}
