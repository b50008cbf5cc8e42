use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use super::fake::Behaviour;
use super::*;
use crate::backup::error::CommandError;
use crate::backup::machine::Authority;

#[tokio::test]
async fn an_operator_activates_the_newest_whole_epoch_and_the_primary_is_superseded() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    primary.epoch(true).await.unwrap();
    primary.acked(2).await;
    let expected = primary.memory.clone();
    primary.torn(true, 2).await.unwrap();

    let alive = backup.handle().failover(true).await.unwrap_err();
    assert!(matches!(alive, CommandError::Refused(text) if text.contains("the primary is alive")));
    drop(primary);
    backup.reaches(State::Waiting).await;
    assert_eq!(backup.host.names(), ["web--incoming"], "losing the link destroys and activates nothing");
    let unasserted = backup.handle().failover(false).await.unwrap_err();
    assert!(matches!(unasserted, CommandError::Refused(text) if text.contains("--primary-is-off")));

    let report = backup.handle().failover(true).await.unwrap();
    assert_eq!((report.epoch, report.authority), (Epoch(2), Authority::Operator));
    assert!(report.built_ms <= report.claimed_ms && report.claimed_ms <= report.running_ms);
    let (memory, state) = backup.host.running(NAME).unwrap();
    assert_eq!(memory, expected, "R5: memory of exactly the last whole epoch");
    assert_eq!(state.as_deref(), Some(&2u64.to_le_bytes()[..]));
    assert_eq!(backup.records.phase(UUID), Some(Phase::Active));
    assert!(backup.told(EventKind::Activated));

    assert_eq!(backup.registry.query(Some(UUID))[0].role, Role::Active);
    let back = Primary::connect(&backup, 2, offer()).await.err().unwrap();
    assert!(matches!(back, LinkError::Superseded { .. }), "{back}");
    let again = backup.handle().failover(true).await.unwrap_err();
    assert!(matches!(again, CommandError::Refused(_)));
    assert!(backup.handle().discard().await.is_err(), "a running guest is not a copy");
    assert!(backup.host.running(NAME).is_some());
}

/// Carries bytes both ways except while frozen.
async fn freezer(near: DuplexStream, far: DuplexStream, frozen: watch::Receiver<bool>) {
    async fn carry(
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        mut frozen: watch::Receiver<bool>,
    ) -> std::io::Result<()> {
        let mut buffer = vec![0; 8192];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                return to.shutdown().await;
            }
            frozen.wait_for(|frozen| !frozen).await.map_err(std::io::Error::other)?;
            to.write_all(&buffer[..read]).await?;
        }
    }
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far);
    let _ = tokio::join!(carry(near_read, far_write, frozen.clone()), carry(far_read, near_write, frozen));
}

#[tokio::test]
async fn a_frozen_primary_that_comes_back_is_superseded_and_never_acknowledged_again() {
    let backup = Backup::new();
    let (ours, near) = duplex(1 << 16);
    let (far, theirs) = duplex(1 << 16);
    let (freeze, frozen) = watch::channel(false);
    tokio::spawn(freezer(near, far, frozen));
    let connected = Primary::over(&backup, 1, offer(), Connection::new(ours), Connection::new(theirs)).await;
    let mut primary = connected.unwrap();
    primary.head().await.unwrap();
    primary.epoch(true).await.unwrap();
    primary.acked(0).await;
    let expected = primary.memory.clone();

    freeze.send_replace(true);
    primary.epoch(true).await.unwrap();
    let mut status = backup.handle().watch();
    status.wait_for(|status| status.suspect).await.unwrap();
    assert!(status.borrow().link_open);
    backup.handle().failover(true).await.unwrap();
    freeze.send_replace(false);

    loop {
        match primary.event().await {
            LinkEvent::Superseded { text } => break assert!(text.contains("runs on the backup"), "{text}"),
            LinkEvent::AckLate(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(backup.host.running(NAME).unwrap().0, expected);
}

#[tokio::test]
async fn an_unarmed_copy_is_never_activated() {
    let backup = Backup::new();
    let mut primary = Primary::begin(&backup).await;
    primary.epoch(false).await.unwrap();
    primary.acked(0).await;
    let refused = backup.handle().failover(true).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(text) if text.contains("not complete")));
    drop(primary);
    backup.reaches(State::Discarded).await;
    assert!(backup.host.names().is_empty());
}

#[tokio::test]
async fn by_policy_the_copy_is_activated_after_the_detection_time() {
    let backup = Backup::new();
    let policy = ProtectOffer { on_primary_loss: OnPrimaryLoss::Activate, ..offer() };
    let mut primary = Primary::connect(&backup, 1, policy).await.unwrap();
    primary.head().await.unwrap();
    primary.epoch(true).await.unwrap();
    primary.acked(0).await;
    let expected = primary.memory.clone();
    let lost = std::time::Instant::now();
    drop(primary);
    let status = backup.reaches(State::Active).await;
    assert!(lost.elapsed() >= Duration::from_millis(u64::from(DETECTION_MS)), "a closed stream alone is not silence");
    assert_eq!(backup.host.running(NAME).unwrap().0, expected);
    assert_eq!(status.activation.unwrap().authority, Authority::Policy);
}

#[tokio::test]
async fn a_name_clash_is_seen_before_the_copy_is_spent() {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    let other = backup.host.add(NAME, ProtectionId::from_u128(1), false);
    drop(primary);
    backup.reaches(State::Waiting).await;
    let refused = backup.handle().failover(true).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(text) if text.contains("already (id 2)")));
    backup.host.remove(other);
    backup.handle().failover(true).await.unwrap();
}

#[tokio::test]
async fn a_copy_that_cannot_start_is_reported_and_destroyed() {
    for behaviour in
        [Behaviour { result: 3, ..Behaviour::default() }, Behaviour { die_at_end: true, ..Behaviour::default() }]
    {
        let backup = Backup::new();
        backup.receivers.behave(behaviour.clone());
        drop(Primary::armed(&backup).await);
        backup.reaches(State::Waiting).await;
        let failed = backup.handle().failover(true).await.unwrap_err();
        assert!(matches!(&failed, CommandError::Failed(_)), "{failed} with {behaviour:?}");
        backup.reaches(State::Discarded).await;
        assert!(backup.host.names().is_empty());
        assert!(backup.told(EventKind::ActivationFailed));
    }
}

#[tokio::test]
async fn a_receiver_that_dies_after_starting_the_copy_has_started_it() {
    let backup = Backup::new();
    backup.receivers.behave(Behaviour { die_before_report: true, ..Behaviour::default() });
    drop(Primary::armed(&backup).await);
    backup.reaches(State::Waiting).await;
    backup.handle().failover(true).await.unwrap();
    assert!(backup.host.running(NAME).is_some(), "R9: a running guest is not destroyed because its receiver died");
}

#[tokio::test]
async fn a_newer_session_replaces_a_copy_whose_link_is_gone() {
    let backup = Backup::new();
    let stale = Primary::armed(&backup).await;
    drop(stale);
    backup.reaches(State::Waiting).await;
    let same = Primary::connect(&backup, 1, offer()).await.err().unwrap();
    assert!(matches!(same, LinkError::Refused { code: RefuseCode::Generation, .. }), "{same}");
    assert_eq!(backup.host.names(), ["web--incoming"], "a refused session destroys nothing");

    let mut fresh = Primary::connect(&backup, 2, offer()).await.unwrap();
    fresh.head().await.unwrap();
    fresh.epoch(true).await.unwrap();
    fresh.acked(0).await;
    assert_eq!(backup.host.names(), ["web--incoming"]);
    assert_eq!(backup.handle().status().domid, Some(DomId(2)));
}

#[tokio::test]
async fn shutting_down_tells_the_primary_and_leaves_no_copy_but_a_running_guest() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    backup.registry.shutdown().await;
    assert!(matches!(primary.event().await, LinkEvent::BackupLost { reason: crate::link::LostReason::Shutdown, .. }));
    assert!(backup.host.names().is_empty());
    let late = Primary::connect(&backup, 2, offer()).await.err().unwrap();
    assert!(matches!(late, LinkError::Refused { code: RefuseCode::ShuttingDown, .. }));

    let backup = Backup::new();
    drop(Primary::armed(&backup).await);
    backup.reaches(State::Waiting).await;
    backup.handle().failover(true).await.unwrap();
    backup.registry.shutdown().await;
    assert!(backup.host.running(NAME).is_some());
}
