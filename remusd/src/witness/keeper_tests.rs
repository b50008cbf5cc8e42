//! Keepers over a witness in memory that fails in every way.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::client::Outcome;
use super::config::ProbeConfig;
use super::keeper::{Answer, Keeper, KeeperEvent, Watched};
use super::memory::MemoryStore;
use super::probe::Probe;
use super::record::{Record, RecordState as S};
use super::rules::{Intent, Refusal};
use super::rules_tests::DOMAIN;
use crate::ids::Generation;
use crate::state::StateDir;

const SOON: Duration = Duration::from_secs(5);

struct Side {
    dir: tempfile::TempDir,
    store: MemoryStore,
    keeper: Keeper,
    events: UnboundedReceiver<KeeperEvent>,
}

impl Side {
    fn new(store: MemoryStore) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (keeper, events) = start(&dir, &store);
        Self { dir, store, keeper, events }
    }

    fn restart(&mut self) {
        (self.keeper, self.events) = start(&self.dir, &self.store);
    }
}

fn start(dir: &tempfile::TempDir, store: &MemoryStore) -> (Keeper, UnboundedReceiver<KeeperEvent>) {
    let state = StateDir::open(dir.path()).unwrap();
    Keeper::start(DOMAIN, Arc::new(store.clone()), &state, None).unwrap()
}

fn pair() -> (Side, Side) {
    let store = MemoryStore::new("m");
    let other = store.other_host();
    (Side::new(store), Side::new(other))
}

fn won(answer: Answer) -> Record {
    match answer {
        Answer::Settled(Outcome::Won(r)) => *r,
        other => panic!("{other:?}"),
    }
}

async fn armed(a: &Side, b: &Side) -> Record {
    won(a.keeper.arm(b.keeper.me().clone(), Generation(1), false, SOON).await)
}

#[tokio::test(start_paused = true)]
async fn exactly_one_claim_wins_and_the_loser_learns_its_fate() {
    let (a, b) = pair();
    let key = armed(&a, &b).await.key();
    won(b.keeper.accept(key, SOON).await);
    let (x, y) = tokio::join!(a.keeper.claim(key, SOON), b.keeper.claim(key, SOON));
    let (winner, loser) = match (x, y) {
        (Answer::Settled(Outcome::Won(_)), Answer::Settled(Outcome::Lost(_))) => (a, b),
        (Answer::Settled(Outcome::Lost(_)), Answer::Settled(Outcome::Won(_))) => (b, a),
        other => panic!("{other:?}"),
    };
    let watcher = loser.keeper.clone();
    let watch = tokio::spawn(async move { watcher.watch_until_settled().await });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!watch.is_finished(), "claimed is not active yet");
    won(winner.keeper.forfeit(key, SOON).await);
    assert!(matches!(watch.await.unwrap(), Watched::Free(r) if r.state == S::Forfeited));
    won(loser.keeper.claim(key, SOON).await);
    won(loser.keeper.activate(key, SOON).await);
    assert!(matches!(winner.keeper.watch_until_settled().await, Watched::Superseded(r) if r.state == S::Active));
}

#[tokio::test(start_paused = true)]
async fn unknown_within_the_limit_settles_later_by_an_event() {
    let (mut a, b) = pair();
    let key = armed(&a, &b).await.key();
    a.store.faults(|f| f.down = true);
    let Answer::Unknown(why) = a.keeper.claim(key, SOON).await else { panic!("it is down") };
    assert!(why.contains("down"), "{why}");
    a.store.faults(|f| f.down = false);
    match a.events.recv().await.unwrap() {
        KeeperEvent::Late { intent: Intent::Claim(k), outcome: Outcome::Won(_) } => assert_eq!(k, key),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn lost_replies_and_requests_make_no_difference() {
    let (a, b) = pair();
    a.store.faults(|f| f.lose_replies = 1);
    let key = armed(&a, &b).await.key();
    b.store.faults(|f| (f.lose_requests, f.lose_replies) = (1, 1));
    won(b.keeper.claim(key, SOON).await);
    assert!(matches!(a.keeper.claim(key, SOON).await, Answer::Settled(Outcome::Lost(_))));
}

#[tokio::test(start_paused = true)]
async fn a_new_call_takes_the_place_of_one_that_does_not_settle() {
    let (a, b) = pair();
    let key = armed(&a, &b).await.key();
    a.store.faults(|f| f.down = true);
    let first = a.keeper.clone();
    let first = tokio::spawn(async move { first.claim(key, Duration::from_secs(3600)).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let second = a.keeper.clone();
    let second = tokio::spawn(async move { second.look(SOON).await });
    assert!(matches!(first.await.unwrap(), Answer::Unknown(why) if why.contains("look")));
    a.store.faults(|f| f.down = false);
    assert!(matches!(second.await.unwrap(), Answer::Settled(Outcome::Seen(r)) if r.state == S::Armed));
}

#[tokio::test(start_paused = true)]
async fn what_was_seen_survives_a_restart_and_a_wiped_witness_is_refused_with_one_alarm() {
    let (mut a, b) = pair();
    let record = armed(&a, &b).await;
    let me = a.keeper.me().clone();
    a.restart();
    assert_eq!(a.keeper.me(), &me);
    a.store.with(super::memory::Table::wipe);
    for _ in 0..3 {
        let refused = a.keeper.claim(record.key(), SOON).await;
        assert!(matches!(refused, Answer::Settled(Outcome::Refused(Refusal::RolledBack(_)))), "{refused:?}");
    }
    assert!(matches!(a.events.recv().await, Some(KeeperEvent::Alarm(_))));
    assert!(a.events.try_recv().is_err(), "said once");
    let again = a.keeper.arm(b.keeper.me().clone(), Generation(1), false, SOON).await;
    assert!(matches!(again, Answer::Settled(Outcome::Refused(_))), "{again:?}");
    assert!(won(a.keeper.force(b.keeper.me().clone(), SOON).await).generation > record.generation);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_won_before_it_is_remembered() {
    let (mut a, b) = pair();
    let witness = a.dir.path().join("witness");
    std::fs::write(&witness, "in the way").unwrap();
    let answer = a.keeper.arm(b.keeper.me().clone(), Generation(1), false, SOON).await;
    assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    assert!(matches!(a.events.recv().await, Some(KeeperEvent::Alarm(text)) if text.contains("witness")));
    std::fs::remove_file(&witness).unwrap();
    assert!(matches!(a.events.recv().await, Some(KeeperEvent::Late { outcome: Outcome::Won(_), .. })));
    assert_ne!(StateDir::open(a.dir.path()).unwrap().watermark(DOMAIN).unwrap(), super::Watermark::default());
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_as_soon_as_the_probe_says_up() {
    let store = MemoryStore::new("m");
    store.faults(|f| f.down = true);
    let config = ProbeConfig { interval_ms: 50, down_after: 1, up_after: 1 };
    let probe = Probe::start(Arc::new(store.clone()), config);
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (keeper, _events) = Keeper::start(DOMAIN, Arc::new(store.clone()), &state, Some(&probe)).unwrap();
    let asked = tokio::spawn(async move { keeper.look(Duration::from_secs(600)).await });
    // By then the waits are at their longest, 2 s.
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.faults(|f| f.down = false);
    let up = tokio::time::Instant::now();
    assert!(matches!(asked.await.unwrap(), Answer::Settled(Outcome::Refused(Refusal::Absent))));
    assert!(up.elapsed() < Duration::from_millis(150), "{:?}", up.elapsed());
}
