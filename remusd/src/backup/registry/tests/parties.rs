//! Paired hosts act on their own protections only.

use super::*;
use crate::link::StopReason;
use crate::witness::HostId;

fn host(n: u128) -> Option<HostId> {
    Some(HostId(uuid::Uuid::from_u128(n)))
}

async fn connect(
    backup: &Backup,
    party: Option<HostId>,
    generation: u64,
    offer: ProtectOffer,
) -> Result<Primary, LinkError> {
    let (ours, theirs) = duplex(1 << 16);
    Primary::of(backup, party, generation, offer, Connection::new(ours), Connection::new(theirs)).await
}

async fn query(
    backup: &Backup,
    party: Option<HostId>,
    protection: Option<ProtectionId>,
) -> Result<Vec<QueryEntry>, LinkError> {
    let (ours, theirs) = duplex(1 << 16);
    let registry = Arc::clone(&backup.registry);
    tokio::spawn(async move { registry.serve_party(Connection::new(theirs), party).await });
    crate::link::handshake::query(Connection::new(ours), "backup", key(0), protection, &options()).await
}

fn is_refused<T>(result: &Result<T, LinkError>) -> bool {
    matches!(result, Err(LinkError::Refused { code: RefuseCode::NotParty, .. }))
}

#[tokio::test]
async fn another_peer_neither_replaces_nor_sees_a_copy() {
    let backup = Backup::new();
    let mut owner = connect(&backup, host(1), 1, offer()).await.unwrap();
    owner.head().await.unwrap();
    owner.epoch(true).await.unwrap();
    owner.acked(0).await;
    let before = backup.handle().status().key;

    // As itself, and in the owner's name.
    assert!(is_refused(&connect(&backup, host(2), 99, offer()).await));
    assert!(is_refused(
        &connect(&backup, host(2), 99, ProtectOffer { host_id: uuid::Uuid::from_u128(1), ..offer() }).await
    ));
    assert!(is_refused(&query(&backup, host(2), Some(UUID)).await));
    assert_eq!(query(&backup, host(2), None).await.unwrap(), []);
    assert_eq!(backup.handle().status().key, before, "the copy is as it was");
    owner.epoch(true).await.unwrap();
    owner.acked(1).await;
    assert_eq!(backup.records.phase(UUID), Some(Phase::Receiving));

    // The owner itself may, and sees it; so does root by ssh.
    assert_eq!(query(&backup, host(1), Some(UUID)).await.unwrap()[0].role, Role::Armed);
    assert_eq!(query(&backup, None, None).await.unwrap().len(), 1);
    connect(&backup, host(1), 100, offer()).await.unwrap();
    assert_ne!(backup.handle().status().key, before);
}

#[tokio::test]
async fn a_copy_that_came_by_ssh_is_not_a_peers_to_take() {
    let backup = Backup::new();
    let _owner = Primary::armed(&backup).await;
    assert!(is_refused(&connect(&backup, host(1), 99, offer()).await));
    assert!(is_refused(&query(&backup, host(1), Some(UUID)).await));
}

#[tokio::test]
async fn where_nothing_is_left_anybody_may_begin() {
    let backup = Backup::new();
    let owner = connect(&backup, host(1), 1, offer()).await.unwrap();
    owner.head().await.unwrap();
    owner.sender.stop(StopReason::Planned).unwrap();
    backup.reaches(State::Discarded).await;
    // A former owner's answer is still nobody else's.
    assert!(is_refused(&query(&backup, host(2), Some(UUID)).await));
    connect(&backup, host(2), 2, offer()).await.unwrap();
    assert!(is_refused(&connect(&backup, host(1), 3, offer()).await));
}
