//! Jobs on mirrored disks, with two real services of each disk.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ::devices::mirror::client::DiskClient;
use ::devices::mirror::service::{Node, NodeConfig, serve_control};

use super::*;
use crate::daemon::disks::DiskJobs;
use crate::ops::Operations;
use crate::ops::operation::{AbortAnswer, Job};

#[path = "../../../../devices/tests/support/slow_link.rs"]
mod slow_link;

use slow_link::slow_link;

const SIZE: u64 = 32 << 20;
const LONG: Duration = Duration::from_secs(60);

struct Pair {
    dir: tempfile::TempDir,
    log: Arc<EventLog>,
    operations: Operations,
    jobs: Arc<DiskJobs>,
    source: DiskClient,
}

fn domain() -> DomainRef {
    DomainRef { domid: Some(DomId(4)), name: "web".into(), uuid: ProtectionId::from_u128(4) }
}

fn by() -> Initiator {
    Initiator { uid: 0, pid: None }
}

/// A service of disk `d0`, on threads of this process.
fn serve(dir: &Path) {
    let path = |name: &str| dir.join(name);
    std::fs::create_dir_all(path("run")).unwrap();
    File::create(path("disk")).unwrap().set_len(SIZE).unwrap();
    let config = NodeConfig {
        name: "d0".into(),
        backing: path("disk"),
        meta: path("meta"),
        run: path("run"),
        above: None,
        links: path("links"),
        memory: 16 << 20,
        journal: None,
        nbd: None,
        via: None,
    };
    let node = Node::open(&config).unwrap();
    std::thread::spawn(move || serve_control(&node, &config.run, "d0"));
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let mut backoff = crate::ops::Backoff::new(Duration::from_millis(10), Duration::from_millis(100), LONG).unwrap();
    loop {
        match look().await {
            Some(found) => return found,
            None => backoff.wait().await.unwrap_or_else(|_| panic!("{what}")),
        }
    }
}

impl Pair {
    /// Source and copy, not connected: the source has contents that the copy has not.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for host in ["a", "b"] {
            serve(&dir.path().join(host));
        }
        let log = Arc::new(EventLog::default());
        let operations = Operations::new(log.clone());
        let run = |host: &str| dir.path().join(host).join("run");
        let jobs = DiskJobs::new(run("a"), operations.clone(), log.clone());
        let (mut source, mut copy) = (DiskClient::new(&run("a"), "d0"), DiskClient::new(&run("b"), "d0"));
        until("the services answer", async || {
            (source.status().await.is_ok() && copy.status().await.is_ok()).then_some(())
        })
        .await;
        let disk = File::options().write(true).open(dir.path().join("a/disk")).unwrap();
        let mut state = 1u64;
        let noise = |_| {
            // Nothing in it is alike by chance.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        let noise: Vec<u8> = (0..SIZE).map(noise).collect();
        disk.write_all_at(&noise, 0).unwrap();
        disk.sync_all().unwrap();
        source.promote(false).await.unwrap();
        source.open().await.unwrap();
        copy.demote().await.unwrap();
        Self { dir, log, operations, jobs, source }
    }

    async fn connect(&mut self, rate: u64) {
        let (at, to) = (self.dir.path().join(format!("link{rate}")), self.dir.path().join("b/run/d0.peer"));
        slow_link(&at, to, rate);
        self.source.connect(Some(&format!("unix:{}", at.display()))).await.unwrap();
    }

    async fn job(&self, what: &str, is: impl Fn(&Job) -> bool) -> Job {
        until(what, async || self.operations.jobs().into_iter().find(&is)).await
    }

    fn told(&self, kind: EventKind) -> Vec<String> {
        let events = self.log.kept(&Filter { kinds: vec![kind], ..Filter::default() });
        events.iter().map(|event| event.detail.clone()).collect()
    }

    async fn alike(&mut self) {
        let source = &mut self.source;
        until("alike", async || source.status().await.is_ok_and(|s| s.in_sync).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronisation_is_a_job_with_progress_and_one_end() {
    let mut pair = Pair::new().await;
    pair.connect(16 << 20).await;
    pair.jobs.follow("d0", domain());
    pair.jobs.follow("d0", domain());
    let running = pair
        .job("a job with progress", |job| job.progress.is_some_and(|p| p.total > 0 && p.pages > 0 && p.pages < p.total))
        .await;
    assert_eq!((running.kind, running.domain.name.as_str()), (OperationKind::DiskSync, "web"));
    assert!(running.abortable && running.initiator.is_none());
    let ended = pair.job("the end", |job| job.state == JobState::Completed).await;
    assert_eq!(ended.id, running.id);
    assert!(ended.detail.contains("32768 KiB"), "{}", ended.detail);
    assert_eq!((pair.told(EventKind::ResyncStarted).len(), pair.told(EventKind::ResyncEnded).len()), (1, 1));
    assert!(!pair.told(EventKind::ResyncProgress).is_empty());
    assert_eq!(pair.told(EventKind::JobCompleted).len(), 1);
    assert!(pair.told(EventKind::JobCancelled).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_synchronisation_ends_the_session() {
    let mut pair = Pair::new().await;
    pair.connect(1 << 20).await;
    pair.jobs.follow("d0", domain());
    let running = pair.job("it runs", |job| job.state == JobState::Running).await;
    assert_eq!(pair.operations.abort(running.id).unwrap(), AbortAnswer::Asked);
    let outcome = pair.operations.ended(running.id).await.unwrap();
    assert_eq!(outcome.word(), "cancelled", "{outcome:?}");
    let status = pair.source.status().await.unwrap();
    assert!(!status.connected && status.via.is_none(), "{status:?}");
    assert!(pair.told(EventKind::ResyncEnded)[0].contains("given up"));
    // And it can be gone on with, as another job.
    pair.connect(64 << 20).await;
    let again = pair.job("another one", |job| job.state == JobState::Completed).await;
    assert!(again.id > running.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn comparing_is_a_job_and_a_difference_fails_it() {
    let mut pair = Pair::new().await;
    assert!(pair.jobs.verify("d0", None, by(), None).await.is_err(), "there is no session");
    assert!(pair.jobs.verify("d7", None, by(), None).await.is_err(), "there is no such disk");
    pair.connect(256 << 20).await;
    pair.alike().await;
    let begun = pair.jobs.verify("d0", Some(domain()), by(), None).await.unwrap();
    let outcome = begun.waiter.unwrap().outcome().await;
    assert_eq!(
        (outcome.word(), outcome.message()),
        ("completed", "disk d0: 32 MiB were compared: both copies are alike")
    );

    let copy = File::options().write(true).open(pair.dir.path().join("b/disk")).unwrap();
    copy.write_all_at(b"something else", 5 << 20).unwrap();
    copy.sync_all().unwrap();
    let begun = pair.jobs.verify("d0", Some(domain()), by(), Some("night".into())).await.unwrap();
    assert!(begun.waiter.is_none());
    let outcome = pair.operations.ended(begun.id).await.unwrap();
    assert!(outcome.word() == "failed" && outcome.message().contains("differ"), "{outcome:?}");
    until("the tag's event", async || (pair.told(EventKind::OperationComplete).len() == 1).then_some(())).await;
    pair.alike().await;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    File::open(pair.dir.path().join("a/disk")).unwrap().read_to_end(&mut a).unwrap();
    File::open(pair.dir.path().join("b/disk")).unwrap().read_to_end(&mut b).unwrap();
    assert!(a == b, "it was not repaired");
}

#[tokio::test(flavor = "multi_thread")]
async fn comparing_can_be_aborted() {
    let mut pair = Pair::new().await;
    pair.connect(64 << 20).await;
    pair.alike().await;
    let begun = pair.jobs.verify("d0", None, by(), None).await.unwrap();
    // It may have ended first, and then it has completed: never both.
    match pair.operations.abort(begun.id).unwrap() {
        AbortAnswer::Asked => {}
        other => panic!("{other:?}"),
    }
    let outcome = begun.waiter.unwrap().outcome().await;
    assert!(["cancelled", "completed"].contains(&outcome.word()), "{outcome:?}");
    let ends = pair.told(EventKind::JobCancelled).len() + pair.told(EventKind::JobCompleted).len();
    assert_eq!(ends, 1);
}
