//! The primary's questions to a witness in memory.

use std::sync::Arc;
use std::time::Duration;

use super::{Asking, Heard, Witness};
use crate::ids::{Generation, ProtectionId};
use crate::link::RecordKey;
use crate::ops::Backoff;
use crate::protect::machine::{Action, Event};
use crate::protect::ownership::Opened;
use crate::state::StateDir;
use crate::witness::memory::MemoryStore;
use crate::witness::{Answer, Health, Host, HostId, Keeper, Outcome, RecordState};

const UUID: ProtectionId = ProtectionId::from_u128(7);
const SOON: Duration = Duration::from_secs(5);

fn keeper(store: &MemoryStore, dir: &tempfile::TempDir) -> (Keeper, Opened) {
    let state = StateDir::open(dir.path()).unwrap();
    let (keeper, events) = Keeper::start(UUID, Arc::new(store.clone()), &state, None).unwrap();
    let (_, health) = tokio::sync::watch::channel(Health::Untried);
    (keeper.clone(), Opened { keeper, events, health, probe: None })
}

struct Pair {
    asking: Asking,
    store: MemoryStore,
    backup: Keeper,
    _dirs: [tempfile::TempDir; 2],
}

async fn pair() -> Pair {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = MemoryStore::new("w");
    let (_, opened) = keeper(&store, &dirs[0]);
    let (backup, _) = keeper(&store.other_host(), &dirs[1]);
    let peer = Host { id: HostId(backup.me().id.0), name: "b".into() };
    let asking = Asking::start(Witness { opened, peer, peer_has_seen: false, at_least: Generation(1) });
    Pair { asking, store, backup, _dirs: dirs }
}

impl Pair {
    async fn ask(&mut self, action: Action) -> Event {
        self.asking.carry_out(action);
        self.next().await
    }

    async fn next(&mut self) -> Event {
        match tokio::time::timeout(Duration::from_secs(20), self.asking.heard()).await.expect("no answer") {
            Heard::Event(event) => event,
            Heard::Alarm(text) => panic!("{text}"),
        }
    }

    async fn armed(&mut self) -> RecordKey {
        match self.ask(Action::ArmRecord { id: 3 }).await {
            Event::RecordArmed { id: 3, key } => key,
            other => panic!("{other:?}"),
        }
    }

    fn state(&self) -> RecordState {
        self.store.with(|t| t.read(UUID).record.unwrap().state)
    }
}

#[tokio::test]
async fn arms_claims_and_records() {
    let mut pair = pair().await;
    let key = pair.armed().await;
    assert_eq!(pair.ask(Action::Claim(key)).await, Event::ClaimWon(key));
    pair.asking.carry_out(Action::Activate(key));
    let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(50), SOON).unwrap();
    while pair.state() != RecordState::Active {
        backoff.wait().await.unwrap();
    }
    let lost = pair.backup.claim(key, SOON).await;
    assert!(matches!(lost, Answer::Settled(Outcome::Lost(_))));
}

#[tokio::test(start_paused = true)]
async fn says_that_it_does_not_know_and_tells_it_later() {
    let mut pair = pair().await;
    let key = pair.armed().await;
    pair.store.faults(|f| f.down = true);
    assert_eq!(pair.ask(Action::Claim(key)).await, Event::ClaimUnknown);
    pair.store.faults(|f| f.down = false);
    assert_eq!(pair.next().await, Event::ClaimWon(key));
}

#[tokio::test]
async fn a_lost_record_is_watched_until_it_is_settled() {
    let mut pair = pair().await;
    let key = pair.armed().await;
    assert!(matches!(pair.backup.claim(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    assert!(matches!(pair.ask(Action::StopRecord(key)).await, Event::RecordLost(_)));
    pair.asking.carry_out(Action::WatchRecord(key));
    assert!(matches!(pair.backup.forfeit(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    assert_eq!(pair.next().await, Event::RecordForfeited);
    assert_eq!(pair.ask(Action::Claim(key)).await, Event::ClaimWon(key));
}

#[tokio::test]
async fn a_stop_and_a_hand_over_are_recorded_and_what_was_handed_over_is_armed_anew() {
    let mut pair = pair().await;
    let key = pair.armed().await;
    assert_eq!(pair.ask(Action::HandRecord(key)).await, Event::RecordHanded);
    assert!(matches!(pair.ask(Action::StopRecord(key)).await, Event::RecordUnknown(_)));
    let newer = pair.armed().await;
    assert!(newer.generation > key.generation, "claimed back, then armed");
    assert_eq!(pair.ask(Action::StopRecord(newer)).await, Event::RecordStopped);
    assert!(matches!(pair.backup.claim(newer, SOON).await, Answer::Settled(Outcome::Lost(_))));
}

#[tokio::test]
async fn a_guest_that_the_other_host_runs_is_not_armed() {
    let mut pair = pair().await;
    let key = pair.armed().await;
    assert!(matches!(pair.backup.claim(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    assert!(matches!(pair.ask(Action::ArmRecord { id: 4 }).await, Event::ArmRefused { id: 4, .. }));
}
