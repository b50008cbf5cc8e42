//! What weakens a copy that goes on is told as it happens, once.

use super::*;
use crate::link::Token;
use crate::witness::Health;

impl Backup {
    fn count(&self, kind: EventKind) -> usize {
        self.events.subscribe().0.iter().filter(|event| event.kind == kind).count()
    }
}

#[tokio::test]
async fn a_witness_out_of_reach_is_told_once_and_its_return_too() {
    let backup = Backup::new();
    let offer = ProtectOffer { witness: Some("w".into()), ..offer() };
    let _primary = Primary::connect(&backup, 1, offer).await.unwrap();
    backup.hears(EventKind::Receiving).await;
    backup.witnesses.health.send_replace(Health::Up);
    backup.witnesses.health.send_replace(Health::Down("refused".into()));
    let text = backup.hears(EventKind::Degraded).await;
    assert!(text.contains("refused"), "{text}");
    backup.witnesses.health.send_replace(Health::Down("timed out".into()));
    backup.witnesses.health.send_replace(Health::Up);
    assert!(backup.hears(EventKind::WhoDecides).await.contains("again"));
    assert_eq!(backup.count(EventKind::Degraded), 1);
    assert_eq!(backup.handle().status().state, State::Syncing, "the next fault would meet it, not this protection");
}

#[tokio::test]
async fn a_full_disk_that_keeps_an_agreement_from_being_written_is_told() {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    *backup.records.full.lock().unwrap() = true;
    let key = crate::link::RecordKey { generation: Generation(4), nonce: Nonce::random() };
    primary.sender.token(1, Token::Witness(key)).unwrap();
    assert!(backup.hears(EventKind::Degraded).await.contains("no space left"));
}

#[tokio::test]
async fn pages_that_cannot_be_audited_are_told_once() {
    let backup = Backup::new();
    *backup.host.unreadable.lock().unwrap() = true;
    let mut primary = Primary::armed(&backup).await;
    for epoch in 2..5 {
        primary.sample(&[(1, primary.memory[&1])]).await;
        primary.epoch(true).await.unwrap();
        primary.settled(&backup, epoch).await;
    }
    assert!(backup.hears(EventKind::Degraded).await.contains("mapping was refused"));
    assert_eq!(backup.count(EventKind::Degraded), 1);
}
