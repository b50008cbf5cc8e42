//! The daemon's jobs, with a protection that does as the test says and a backup whose xl is played.

mod again;
mod deciding;
mod disk_jobs;
mod policies;
mod tracing_epochs;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use super::witness::Witnesses;
use super::*;
use crate::backup::registry::tests::Double as BackupDouble;
use crate::ids::DomId;
use crate::ops::operation::{Initiator, JobState};
use crate::ops::{Event, EventKind, Filter, OperationKind};
use crate::protect::driver::double::Script;
use crate::protect::driver::{Handle, Order, double};
use crate::protect::fate::ToolstackError;
use crate::protect::machine::{GuestEnd, StopWhy};
use crate::protect::options::ProtectOptions;
use crate::xen::{FakeHypervisor, FakeStore, GuestType};

type SetUp = Result<Arc<Handle>, ApiError>;
pub(super) type Double = Box<dyn Fn(&str) -> SetUp + Send + Sync>;

const WEB: ProtectionId = ProtectionId::from_u128(0x1234);
const ROOT: Initiator = Initiator { uid: 0, pid: Some(1) };
const SOON: Duration = Duration::from_secs(60);

struct NoToolstack;

#[async_trait]
impl Toolstack for NoToolstack {
    async fn destroy(&self, _: DomId) -> Result<(), ToolstackError> {
        Ok(())
    }
    async fn dump_core(&self, _: DomId, _: &str) -> Result<(), ToolstackError> {
        Ok(())
    }
    async fn rename(&self, _: DomId, _: &str) -> Result<(), ToolstackError> {
        Ok(())
    }
    async fn create(&self, _: &str) -> Result<DomId, ToolstackError> {
        Err(ToolstackError { what: "create".into(), text: "not here".into() })
    }
}

/// A daemon on a host with one running domain, web.
struct Fixture {
    daemon: Arc<Daemon>,
    backup: BackupDouble,
    hypervisor: Arc<FakeHypervisor>,
    store: Arc<FakeStore>,
    /// What the next set-ups of a protection come to; the last one's for ever.
    set_ups: Arc<Mutex<VecDeque<SetUp>>>,
    asked: Arc<Mutex<u32>>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(false).await
    }

    async fn with(copy: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backup = BackupDouble::new(copy).await;
        let (hypervisor, store) = (Arc::new(FakeHypervisor::new()), Arc::new(FakeStore::new()));
        hypervisor.add(DomId(3), WEB, GuestType::Pvh);
        store.write("/local/domain/3/name", "web").await.unwrap();
        let host = Host {
            hypervisor: hypervisor.clone(),
            store: store.clone(),
            pages: None,
            toolstack: Arc::new(NoToolstack),
            guard: Box::new(|domid| Err(XenError::NoDomain { domid })),
            helper: None,
        };
        let state = StateDir::open(dir.path()).unwrap();
        let witnesses = Arc::new(Witnesses::new(state.clone(), dir.path().join("witness.json")));
        let daemon = Arc::new(Daemon::new(host, state, backup.events.clone(), backup.registry.clone(), witnesses));
        let set_ups = Arc::<Mutex<VecDeque<SetUp>>>::default();
        let asked = Arc::<Mutex<u32>>::default();
        let (next, count) = (set_ups.clone(), asked.clone());
        let double: Double = Box::new(move |_| {
            *count.lock().unwrap() += 1;
            let mut next = next.lock().unwrap();
            match next.len() {
                0 => Err(ApiError::new(ErrorCode::Failed, "no set-up was prepared")),
                1 => next[0].clone(),
                _ => next.pop_front().unwrap(),
            }
        });
        assert!(daemon.double.set(double).is_ok());
        Self { daemon, backup, hypervisor, store, set_ups, asked, _dir: dir }
    }

    /// The next set-up brings about this protection.
    fn comes_to_be(&self) -> Script {
        let (handle, script) = double::handle();
        self.set_ups.lock().unwrap().push_back(Ok(handle));
        script
    }

    fn fails(&self, code: ErrorCode, text: &str) {
        self.set_ups.lock().unwrap().push_back(Err(ApiError::new(code, text)));
    }

    /// A protection of web that runs already.
    async fn protected(&self) -> Script {
        let (handle, script) = double::handle();
        script.state(State::Idle(crate::ids::Epoch(4)), true);
        let primary = Primary {
            domain: domain(),
            target: Target::Blackhole,
            generation: Generation(1),
            unsafe_target: false,
            witness: false,
            handle,
        };
        self.daemon.primaries.lock().await.insert(WEB, primary);
        script
    }

    async fn protect(&self, tag: Option<&str>) -> jobs::Begun {
        let tag = tag.map(Into::into);
        self.daemon.begin_protect("web", Target::Blackhole, ProtectOptions::default(), ROOT, tag).await.unwrap()
    }

    fn events(&self, kinds: &[EventKind]) -> Vec<Arc<Event>> {
        self.daemon.log.kept(&Filter { kinds: kinds.to_vec(), ..Filter::default() })
    }

    /// The ends that were told, oldest first: kind of event, of job, tag.
    fn ends(&self) -> Vec<(EventKind, OperationKind, Option<String>)> {
        let told = self.events(&[
            EventKind::JobCompleted,
            EventKind::JobCancelled,
            EventKind::JobFailed,
            EventKind::OperationComplete,
        ]);
        told.iter()
            .map(|event| {
                let note = event.operation.clone().unwrap();
                (event.kind, note.kind, note.tag)
            })
            .collect()
    }

    /// Waits until this was told, and returns its words.
    async fn hears(&self, kind: EventKind) -> String {
        let (past, mut live) = self.daemon.log.subscribe_to(Filter { kinds: vec![kind], ..Filter::default() });
        if let Some(event) = past.first() {
            return event.detail.clone();
        }
        match tokio::time::timeout(SOON, live.next()).await {
            Ok(Some(crate::ops::Delivery::Event(event))) => event.detail.clone(),
            other => panic!("no {kind:?} but {other:?}"),
        }
    }
}

fn domain() -> DomainRef {
    DomainRef { domid: Some(DomId(3)), name: "web".into(), uuid: WEB }
}

async fn soon<T>(wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, wait).await.expect("in time")
}

#[tokio::test]
async fn protecting_completes_once_the_guest_is_protected_and_says_how_far_it_is_until_then() {
    let fixture = Fixture::new().await;
    let script = fixture.comes_to_be();
    let begun = fixture.protect(None).await;
    let mut progress = begun.progress.clone();
    script.sent.send_modify(|sent| (sent.pages, sent.bytes) = (100, 4096));
    let told = soon(progress.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert_eq!((told.pages, told.bytes, told.total), (100, 4096, 128 << 8), "128 MiB are to be sent");
    assert_eq!(fixture.ends(), []);
    let job = fixture.daemon.operations.jobs().pop().unwrap();
    assert_eq!((job.state, job.abortable, job.initiator), (JobState::Running, true, Some(ROOT)));
    script.state(State::Idle(crate::ids::Epoch(1)), true);
    assert_eq!(soon(begun.answer()).await.unwrap()["message"], "protected");
    assert_eq!(fixture.ends(), [(EventKind::JobCompleted, OperationKind::Protect, None)]);
}

#[tokio::test]
async fn an_end_is_told_once_with_the_initiators_tag() {
    let fixture = Fixture::new().await;
    fixture.fails(ErrorCode::Peer, "hostb does not answer");
    let begun = fixture.protect(Some("mine")).await;
    let id = begun.id;
    assert_eq!(begun.answer().await.unwrap(), serde_json::json!({ "job": id }));
    assert!(fixture.hears(EventKind::OperationComplete).await.contains("hostb does not answer"));
    let tag = Some("mine".to_owned());
    let protect = OperationKind::Protect;
    assert_eq!(fixture.ends(), [(EventKind::JobFailed, protect, None), (EventKind::OperationComplete, protect, tag)]);
    let note = fixture.events(&[EventKind::OperationComplete])[0].operation.clone().unwrap();
    assert_eq!((note.id, note.code), (id, Some(ErrorCode::Peer)));
}

#[tokio::test]
async fn an_unknown_domain_begins_no_job() {
    let fixture = Fixture::new().await;
    let options = ProtectOptions::default();
    let error = fixture.daemon.begin_protect("db", Target::Blackhole, options, ROOT, None).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(fixture.daemon.begin_unprotect("web", ROOT, None).await.err().unwrap().code, ErrorCode::NotFound);
    assert_eq!(fixture.daemon.begin_switchover("web", ROOT, None).await.err().unwrap().code, ErrorCode::NotFound);
    assert_eq!(fixture.daemon.begin_failover("web", true, ROOT, None).err().unwrap().code, ErrorCode::NotFound);
    assert_eq!(fixture.daemon.begin_discard("web", ROOT, None).err().unwrap().code, ErrorCode::NotFound);
    assert!(fixture.daemon.operations.jobs().is_empty() && fixture.ends().is_empty(), "nothing is left behind");
}

#[tokio::test]
async fn an_aborted_protection_is_stopped_and_ends_as_cancelled() {
    let fixture = Fixture::new().await;
    let mut script = fixture.comes_to_be();
    let begun = fixture.protect(None).await;
    let daemon = fixture.daemon.clone();
    let id = begun.id;
    let abort = tokio::spawn(async move { daemon.abort_job(id, true).await });
    assert!(matches!(soon(script.orders.recv()).await, Some(Order::Stop)));
    assert_eq!(fixture.ends(), [], "not before the copy is gone");
    script.end(Outcome::Stopped);
    let answer = soon(abort).await.unwrap().unwrap();
    assert_eq!((&answer["ended"], &answer["outcome"]), (&true.into(), &"cancelled".into()));
    assert_eq!(begun.answer().await.unwrap_err().code, ErrorCode::Cancelled);
    assert_eq!(fixture.ends(), [(EventKind::JobCancelled, OperationKind::Protect, None)]);
    let again = fixture.daemon.abort_job(id, false).await.unwrap();
    assert_eq!(again["ended"], true, "an ended job's end is its answer");
}

#[tokio::test]
async fn a_protection_that_ends_before_it_protects_is_what_its_end_says() {
    for (end, code) in [
        (Outcome::Stopped, ErrorCode::Cancelled),
        (Outcome::NotStarted("no qdisc".into()), ErrorCode::Failed),
        (Outcome::Alone("the backup is lost".into()), ErrorCode::Failed),
        (Outcome::GuestEnded(GuestEnd::Poweroff), ErrorCode::Failed),
        (Outcome::Superseded("it runs there".into()), ErrorCode::Conflict),
    ] {
        let fixture = Fixture::new().await;
        let script = fixture.comes_to_be();
        let begun = fixture.protect(None).await;
        script.end(end.clone());
        assert_eq!(soon(begun.answer()).await.unwrap_err().code, code, "{end:?}");
        assert_eq!(fixture.ends().len(), 1, "{end:?}");
    }
}

#[tokio::test]
async fn unprotecting_stops_and_says_what_became_of_the_guest() {
    for (end, good) in [
        (Outcome::Stopped, true),
        (Outcome::Alone("the backup is lost".into()), true),
        (Outcome::GuestEnded(GuestEnd::Crash), true),
        (Outcome::HandedOver("hostb has it".into()), false),
        (Outcome::Superseded("hostb has it".into()), false),
    ] {
        let fixture = Fixture::new().await;
        let mut script = fixture.protected().await;
        let begun = fixture.daemon.begin_unprotect("web", ROOT, None).await.unwrap();
        assert!(matches!(soon(script.orders.recv()).await, Some(Order::Stop)));
        let refused = fixture.daemon.abort_job(begun.id, false).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Conflict, "half a stop is none");
        script.end(end.clone());
        assert_eq!(soon(begun.answer()).await.is_ok(), good, "{end:?}");
        assert_eq!(fixture.ends().len(), 1, "{end:?}");
    }
}

#[tokio::test]
async fn unprotecting_what_is_being_set_up_makes_it_give_up() {
    let fixture = Fixture::new().await;
    let mut script = fixture.comes_to_be();
    let protect = fixture.protect(None).await;
    let unprotect = fixture.daemon.begin_unprotect("web", ROOT, None).await.unwrap();
    assert!(matches!(soon(script.orders.recv()).await, Some(Order::Stop)));
    script.end(Outcome::Stopped);
    assert!(soon(unprotect.answer()).await.is_ok());
    assert_eq!(soon(protect.answer()).await.unwrap_err().code, ErrorCode::Cancelled);
    let kinds: Vec<_> = fixture.ends().into_iter().map(|(event, job, _)| (event, job)).collect();
    assert_eq!(
        kinds,
        [(EventKind::JobCancelled, OperationKind::Protect), (EventKind::JobCompleted, OperationKind::Unprotect)]
    );
}

#[tokio::test]
async fn unprotecting_what_the_witness_has_not_decided_is_refused() {
    let fixture = Fixture::new().await;
    let script = fixture.protected().await;
    let key = crate::link::RecordKey { generation: Generation(2), nonce: crate::ids::Nonce::random() };
    script.state(State::Holding(StopWhy::Failed("silence".into())), false);
    script.snapshot.send_modify(|snapshot| snapshot.token = crate::link::Token::Witness(key));
    let error = fixture.daemon.begin_unprotect("web", ROOT, None).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains("assume-alone"), "{error}");
}

#[tokio::test]
async fn a_switchover_completes_with_what_the_protection_answers() {
    for (answer, downtime) in [(Ok(Duration::from_millis(70)), Some(70)), (Err("the backup cannot".to_owned()), None)] {
        let fixture = Fixture::new().await;
        let mut script = fixture.protected().await;
        let begun = fixture.daemon.begin_switchover("web", ROOT, None).await.unwrap();
        let Some(Order::SwitchOver(reply)) = soon(script.orders.recv()).await else { panic!("no order") };
        reply.send(answer).unwrap();
        let result = soon(begun.answer()).await;
        assert_eq!(result.as_ref().ok().map(|value| value["downtime_ms"].as_u64().unwrap()), downtime);
        assert_eq!(fixture.ends().len(), 1);
    }
    // A protection that is over drops the order.
    let fixture = Fixture::new().await;
    drop(fixture.protected().await);
    let begun = fixture.daemon.begin_switchover("web", ROOT, None).await.unwrap();
    assert_eq!(soon(begun.answer()).await.unwrap_err().code, ErrorCode::Conflict);
}

#[tokio::test]
async fn a_failover_needs_a_word_and_completes_when_the_copy_runs() {
    let mut fixture = Fixture::with(true).await;
    let name = fixture.backup.name;
    let error = fixture.daemon.begin_failover(name, false, ROOT, None).err().unwrap();
    assert!(error.message.contains("--primary-is-off"), "{error}");
    fixture.backup.lose_primary();
    fixture.hears(EventKind::PrimarySuspect).await;
    let begun = fixture.daemon.begin_failover(name, true, ROOT, Some("go".into())).unwrap();
    assert!(begun.waiter.is_none());
    let text = fixture.hears(EventKind::OperationComplete).await;
    assert!(text.contains("from epoch 1"), "{text}");
    let failover = OperationKind::Failover;
    let ends = fixture.ends();
    assert_eq!(ends[0], (EventKind::JobCompleted, failover, None));
    assert_eq!(ends[1], (EventKind::OperationComplete, failover, Some("go".into())));
    assert_eq!(ends.len(), 2);
}

#[tokio::test]
async fn a_discarded_copy_is_gone_when_the_job_is_complete() {
    let fixture = Fixture::with(true).await;
    let begun = fixture.daemon.begin_discard(fixture.backup.name, ROOT, None).unwrap();
    assert!(soon(begun.answer()).await.is_ok());
    assert!(fixture.events(&[EventKind::Discarded])[0].seq < fixture.events(&[EventKind::JobCompleted])[0].seq);
}

#[tokio::test]
async fn a_shutdown_ends_every_job_and_begins_no_more() {
    let fixture = Fixture::new().await;
    let mut script = fixture.comes_to_be();
    let begun = fixture.protect(Some("t")).await;
    assert!(begun.waiter.is_none());
    let daemon = fixture.daemon.clone();
    let down = tokio::spawn(async move { daemon.shut_down().await });
    assert!(matches!(soon(script.orders.recv()).await, Some(Order::Stop)));
    script.end(Outcome::Stopped);
    soon(down).await.unwrap();
    assert_eq!(fixture.ends().len(), 2);
    let options = ProtectOptions::default();
    let late = fixture.daemon.begin_protect("web", Target::Blackhole, options, ROOT, None).await.err().unwrap();
    assert_eq!(late.code, ErrorCode::Conflict);
    assert_eq!(fixture.ends().len(), 2, "a refused one was never there");
}
