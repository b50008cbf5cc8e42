//! The suspend protocol against the doubles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::domain::{GuestType, ShutdownReason};
use super::fake::{FakeHypervisor, FakeStore, Manners, live};
use super::hypervisor::{HvmParam, Hypervisor};
use super::store::{Compared, XenStore, shutdown_path};
use super::suspend::{Settled, SuspendError, Suspender};
use crate::ids::DomId;

const DOM: DomId = DomId(3);
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(50);

struct Scene {
    hypervisor: Arc<FakeHypervisor>,
    store: Arc<FakeStore>,
    suspender: Suspender,
    _guest: tokio::task::JoinHandle<()>,
}

async fn scene(guest_type: GuestType, manners: Manners) -> Scene {
    let hypervisor = Arc::new(FakeHypervisor::new());
    hypervisor.add(DOM, Uuid::nil(), guest_type);
    let store = Arc::new(FakeStore::new());
    let guest = live(Arc::clone(&hypervisor), Arc::clone(&store), DOM, manners);
    let suspender = Suspender::new(DOM, hypervisor.clone(), store.clone()).await.unwrap();
    Scene { hypervisor, store, suspender, _guest: guest }
}

impl Scene {
    async fn suspend(&mut self, patience: Duration) -> Result<(), SuspendError> {
        self.suspender.suspend(Instant::now() + patience).await.map(drop)
    }

    async fn is_suspended(&self) -> bool {
        let info = self.hypervisor.domain(DOM).await.unwrap().unwrap();
        info.state.is_suspended()
    }
}

#[tokio::test]
async fn suspends_and_resumes_many_times() {
    let mut scene = scene(GuestType::Pvh, Manners::Suspends).await;
    for _ in 0..20 {
        scene.suspend(LONG).await.unwrap();
        assert!(scene.is_suspended().await);
        scene.suspender.resume().await.unwrap();
        assert!(!scene.is_suspended().await);
    }
    let resumes = scene.hypervisor.calls();
    assert_eq!(resumes, vec!["resume 3"; 20]);
}

#[tokio::test]
async fn a_deaf_guest_loses_the_request() {
    let mut scene = scene(GuestType::Pvh, Manners::Ignores).await;
    let error = scene.suspend(SHORT).await.unwrap_err();
    assert!(matches!(error, SuspendError::NotAcknowledged { .. }), "{error}");
    let left = scene.store.read(&shutdown_path(DOM)).await.unwrap();
    assert_eq!(left.as_deref(), Some(""), "no request is left behind");
}

#[tokio::test]
async fn a_late_suspend_is_settled() {
    let mut scene = scene(GuestType::Pvh, Manners::TakesOnly).await;
    let error = scene.suspend(SHORT).await.unwrap_err();
    assert!(matches!(error, SuspendError::Timeout { .. }), "{error}");
    assert_eq!(scene.suspender.settle(SHORT).await.unwrap(), Settled::Undecided);
    let (hypervisor, store) = (scene.hypervisor.clone(), scene.store.clone());
    let late = tokio::spawn(async move {
        tokio::time::sleep(SHORT).await;
        hypervisor.stop(DOM, ShutdownReason::Suspend);
        store.fire("@releaseDomain");
    });
    assert_eq!(scene.suspender.settle(LONG).await.unwrap(), Settled::Resumed);
    late.await.unwrap();
    assert!(!scene.is_suspended().await);
}

#[tokio::test]
async fn a_pending_request_is_settled_by_withdrawing_it() {
    let mut scene = scene(GuestType::Pvh, Manners::Ignores).await;
    scene.store.write(&shutdown_path(DOM), "suspend").await.unwrap();
    assert_eq!(scene.suspender.settle(LONG).await.unwrap(), Settled::Running);
    assert_eq!(scene.store.withdraw_suspend(DOM).await.unwrap(), Compared::Differs(Some(String::new())));
}

#[tokio::test]
async fn other_ends_are_told_apart() {
    for reason in [ShutdownReason::Poweroff, ShutdownReason::Reboot, ShutdownReason::Crash] {
        let mut scene = scene(GuestType::Pvh, Manners::Stops(reason)).await;
        match scene.suspend(LONG).await {
            Err(SuspendError::WrongReason { reason: seen, .. }) => assert_eq!(seen, reason),
            other => panic!("{other:?}"),
        }
    }
    let mut gone = scene(GuestType::Pvh, Manners::Ignores).await;
    let (hypervisor, store) = (gone.hypervisor.clone(), gone.store.clone());
    tokio::spawn(async move {
        tokio::time::sleep(SHORT).await;
        hypervisor.remove(DOM);
        store.fire("@releaseDomain");
    });
    assert!(matches!(gone.suspend(LONG).await, Err(SuspendError::DomainGone { domid: DOM })));
}

#[tokio::test]
async fn paused_and_suspended_guests_are_not_asked() {
    let mut scene = scene(GuestType::Pvh, Manners::Suspends).await;
    scene.hypervisor.pause(DOM).await.unwrap();
    assert!(matches!(scene.suspend(LONG).await, Err(SuspendError::Paused { .. })));
    scene.hypervisor.unpause(DOM).await.unwrap();
    scene.hypervisor.stop(DOM, ShutdownReason::Suspend);
    assert!(matches!(scene.suspend(LONG).await, Err(SuspendError::AlreadySuspended { .. })));
    assert_eq!(scene.store.read(&shutdown_path(DOM)).await.unwrap(), None);
}

#[tokio::test]
async fn an_hvm_guest_without_drivers_is_stopped_from_outside() {
    let mut scene = scene(GuestType::Hvm, Manners::Ignores).await;
    scene.hypervisor.set_param(DOM, HvmParam::CallbackIrq, 0);
    let suspended = scene.suspender.suspend(Instant::now() + LONG).await.unwrap();
    assert!(!suspended.cooperated);
    assert_eq!(scene.hypervisor.calls(), ["shutdown 3"]);
    assert_eq!(scene.store.read(&shutdown_path(DOM)).await.unwrap(), None);
}

#[tokio::test]
async fn a_missing_domain_is_refused() {
    let missing = Suspender::new(DomId(99), Arc::new(FakeHypervisor::new()), Arc::new(FakeStore::new())).await;
    assert!(matches!(missing.err(), Some(SuspendError::DomainGone { .. })));
}
