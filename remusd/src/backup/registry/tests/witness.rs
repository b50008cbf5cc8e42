//! Flows with a witness, and switchovers.

use super::fake::Behaviour;
use super::*;
use crate::backup::machine::Authority;
use crate::link::Token;
use crate::protect::ownership::WitnessSource;
use crate::witness::{Answer, Keeper, Outcome, Record, RecordState};

const SOON: Duration = Duration::from_secs(5);

/// The primary's side of the witness.
struct Owner {
    keeper: Keeper,
    me: Host,
    _opened: Opened,
}

impl Owner {
    fn of(backup: &Backup) -> Self {
        let witnesses = backup.witnesses.primary();
        let opened = witnesses.open("w", UUID).unwrap();
        Self { keeper: opened.keeper.clone(), me: opened.keeper.me().clone(), _opened: opened }
    }

    async fn record(&self) -> Record {
        match self.keeper.look(SOON).await {
            Answer::Settled(Outcome::Seen(record)) => *record,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the record is in this state.
    async fn reaches(&self, state: RecordState) -> Record {
        let mut backoff =
            crate::ops::Backoff::new(Duration::from_millis(5), Duration::from_millis(50), Duration::from_secs(10))
                .unwrap();
        loop {
            let record = self.record().await;
            if record.state == state {
                return record;
            }
            backoff.wait().await.unwrap_or_else(|_| panic!("not {state:?} but {record}"));
        }
    }
}

/// A protection with an armed epoch, whose record is armed and agreed.
async fn agreed(backup: &Backup) -> (Primary, Owner, crate::witness::RecordKey) {
    let owner = Owner::of(backup);
    let offer = ProtectOffer { witness: Some("w".into()), host_id: owner.me.id.0, ..offer() };
    let mut primary = Primary::connect(backup, 1, offer).await.unwrap();
    assert!(!primary.sender.peer().knows_record);
    let peer = Host { id: HostId(primary.sender.peer().host_id), name: "b".into() };
    assert_eq!(peer.id, backup.witnesses.state.host().unwrap().id);
    let Answer::Settled(Outcome::Won(record)) = owner.keeper.arm(peer, crate::ids::Generation(1), false, SOON).await
    else {
        panic!("not armed");
    };
    primary.head().await.unwrap();
    primary.epoch(false).await.unwrap();
    primary.acked(0).await;
    primary.sender.token(1, Token::Witness(record.key())).unwrap();
    assert_eq!(primary.event().await, LinkEvent::TokenAck { seq: 1 });
    let kept = backup.records.record(UUID).unwrap();
    assert_eq!(kept.token, Token::Witness(record.key()), "durable before it is acknowledged");
    primary.epoch(true).await.unwrap();
    primary.acked(1).await;
    (primary, owner, record.key())
}

#[tokio::test]
async fn the_witness_gives_the_guest_to_the_backup_of_a_lost_primary() {
    let backup = Backup::new();
    let (primary, owner, _) = agreed(&backup).await;
    let expected = primary.memory.clone();
    drop(primary);
    let status = backup.reaches(State::Active).await;
    assert_eq!(status.activation.unwrap().authority, Authority::Witness);
    assert!(backup.told_in_order(&[EventKind::PrimarySuspect, EventKind::ArbitrationWon, EventKind::Activated]));
    assert!(!backup.told(EventKind::ArbitrationLost));
    assert_eq!(backup.host.running(NAME).unwrap().0, expected);
    let record = owner.reaches(RecordState::Active).await;
    assert_eq!(record.owner.id, backup.witnesses.state.host().unwrap().id);
    assert!(matches!(owner.keeper.claim(record.key(), SOON).await, Answer::Settled(Outcome::Lost(_))));
}

#[tokio::test]
async fn a_copy_that_lost_the_record_is_kept_until_the_winner_runs() {
    let backup = Backup::new();
    let (primary, owner, key) = agreed(&backup).await;
    assert!(matches!(owner.keeper.claim(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    drop(primary);
    backup.reaches(State::Yielding).await;
    assert_eq!(backup.host.names(), ["web--incoming"], "F6: it may yet be the only one");
    assert!(backup.told(EventKind::ArbitrationLost) && !backup.told(EventKind::ArbitrationWon));
    assert!(matches!(owner.keeper.activate(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    backup.reaches(State::Discarded).await;
    assert!(backup.host.names().is_empty());
}

#[tokio::test]
async fn a_winner_that_cannot_start_gives_the_record_back() {
    let backup = Backup::new();
    backup.receivers.behave(Behaviour { result: 3, ..Behaviour::default() });
    let (primary, owner, key) = agreed(&backup).await;
    drop(primary);
    backup.reaches(State::Discarded).await;
    assert!(backup.host.names().is_empty());
    owner.reaches(RecordState::Forfeited).await;
    assert!(matches!(owner.keeper.claim(key, SOON).await, Answer::Settled(Outcome::Won(_))), "the primary may go on");
}

#[tokio::test]
async fn without_an_answer_the_built_copy_waits_and_an_operator_may_start_it() {
    let backup = Backup::new();
    let (primary, owner, _) = agreed(&backup).await;
    backup.witnesses.store.faults(|f| f.down = true);
    drop(primary);
    backup.reaches(State::Claiming).await;
    assert!(backup.host.running(NAME).is_none());
    assert!(backup.records.record(UUID).unwrap().owed);
    backup.handle().assume_alone().await.unwrap();
    backup.reaches(State::Active).await;
    backup.witnesses.store.faults(|f| f.down = false);
    let record = owner.reaches(RecordState::Active).await;
    assert_ne!(record.owner.id, owner.me.id, "the record follows the operator");
}

#[tokio::test]
async fn a_host_without_carrier_abstains() {
    let backup = Backup::new();
    *backup.host.carrier.lock().unwrap() = Some(false);
    let (primary, owner, _) = agreed(&backup).await;
    drop(primary);
    let mut status = backup.handle().watch();
    let abstains = status.wait_for(|s| s.detail.contains("no carrier"));
    tokio::time::timeout(Duration::from_secs(10), abstains).await.unwrap().unwrap();
    assert_eq!(owner.record().await.state, RecordState::Armed);
    *backup.host.carrier.lock().unwrap() = Some(true);
    backup.reaches(State::Active).await;
}

/// A daemon that died between its claim and the guest's start must not leave a primary waiting for ever.
#[tokio::test]
async fn a_restarted_daemon_gives_up_what_the_dead_one_may_have_won() {
    for arrived in [true, false] {
        let backup = Backup::new();
        let (primary, owner, key) = agreed(&backup).await;
        let opened = backup.witnesses.open("w", UUID).unwrap();
        if arrived {
            assert!(matches!(opened.keeper.claim(key, SOON).await, Answer::Settled(Outcome::Won(_))));
        }
        let mut record = backup.records.record(UUID).unwrap();
        record.owed = true;
        let records = MemoryRecords::default();
        records.save(&record).unwrap();
        let restarted = Backup::with_witnesses(records, backup.witnesses.clone());
        restarted.registry.recover().await.unwrap();
        owner.reaches(RecordState::Forfeited).await;
        drop((primary, opened));
    }
}

#[tokio::test]
async fn a_handed_over_guest_runs_here_and_the_primary_is_told() {
    for witness in [true, false] {
        let backup = Backup::new();
        let (mut primary, owner) = match witness {
            true => {
                let (primary, owner, key) = agreed(&backup).await;
                assert!(matches!(owner.keeper.hand_to(key, SOON).await, Answer::Settled(Outcome::Won(_))));
                primary.sender.hand_over(Epoch(1), Token::Witness(key)).unwrap();
                (primary, Some(owner))
            }
            false => {
                let primary = Primary::armed(&backup).await;
                primary.sender.hand_over(Epoch(1), Token::Primary).unwrap();
                (primary, None)
            }
        };
        assert!(matches!(primary.event().await, LinkEvent::Superseded { .. }), "witness {witness}");
        assert_eq!(backup.handle().status().activation.unwrap().authority, Authority::Handover);
        assert!(backup.host.running(NAME).is_some());
        if let Some(owner) = owner {
            owner.reaches(RecordState::Active).await;
        }
    }
}

#[tokio::test]
async fn a_hand_over_that_fails_is_told_when_nothing_is_left() {
    let backup = Backup::new();
    backup.receivers.behave(Behaviour { result: 3, ..Behaviour::default() });
    let (mut primary, owner, key) = agreed(&backup).await;
    assert!(matches!(owner.keeper.hand_to(key, SOON).await, Answer::Settled(Outcome::Won(_))));
    primary.sender.hand_over(Epoch(1), Token::Witness(key)).unwrap();
    assert!(matches!(primary.event().await, LinkEvent::HandoverFailed { .. }));
    assert!(backup.host.names().is_empty());
    assert_eq!(owner.record().await.state, RecordState::Forfeited, "the record before the word");

    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    backup.host.add(NAME, ProtectionId::from_u128(4), false);
    primary.sender.hand_over(Epoch(1), Token::Primary).unwrap();
    assert!(matches!(primary.event().await, LinkEvent::HandoverFailed { text } if text.contains(NAME)));
}
