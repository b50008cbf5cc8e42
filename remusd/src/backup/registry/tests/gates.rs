//! The gate from the first byte of a copy to its end, and the audit.

use super::*;
use crate::audit::Sample;

impl Backup {
    fn guarded(&self) -> Vec<ProtectionId> {
        self.gate.entries().unwrap().into_iter().map(|entry| entry.uuid).collect()
    }
}

impl Primary {
    /// Waits for an acknowledgement and then until the receiver has taken everything in.
    pub(super) async fn settled(&mut self, backup: &Backup, epoch: u64) {
        self.acked(epoch).await;
        let mut status = backup.handle().watch();
        let settled = status.wait_for(|s| s.backlog_epochs == 0 && s.acked == Some(Epoch(epoch)));
        tokio::time::timeout(Duration::from_secs(10), settled).await.unwrap().unwrap();
    }

    /// A sample of the epoch that was sent last: pages and what the guest has in them.
    pub(super) async fn sample(&self, pages: &[(u64, u8)]) {
        let pages = pages.iter().map(|(gfn, fill)| (*gfn, fake::hash(*fill))).collect();
        self.sender.audit(Sample { epoch: Epoch(self.next - 1), pages }).await.unwrap();
    }
}

#[tokio::test]
async fn the_copy_is_guarded_until_this_host_owns_it_and_opened_before_it_runs() {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    assert_eq!(backup.guarded(), [UUID]);
    drop(primary);
    backup.reaches(State::Waiting).await;
    assert_eq!(backup.guarded(), [UUID], "losing the primary makes nobody the owner");
    assert!(backup.host.opened.lock().unwrap().is_empty());
    backup.handle().failover(true).await.unwrap();
    assert_eq!(*backup.host.opened.lock().unwrap(), ["web--incoming"], "opened once, before it had its name and ran");
    assert!(backup.guarded().is_empty());
}

#[tokio::test]
async fn a_copy_that_ends_leaves_no_guard_and_was_never_opened() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    primary.sender.stop(crate::link::StopReason::Planned).unwrap();
    assert_eq!(primary.event().await, LinkEvent::Stopped);
    backup.reaches(State::Discarded).await;
    assert!(backup.guarded().is_empty());
    assert!(backup.host.opened.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_restarted_daemon_releases_what_it_destroys() {
    let backup = Backup::new();
    let _primary = Primary::armed(&backup).await;
    assert_eq!(backup.guarded(), [UUID]);
    // Another daemon on the same records and the same host.
    let settings = BackupSettings { gate: Some(backup.gate.clone()), ..BackupSettings::default() };
    let next = Registry::new(
        backup.host.clone(),
        backup.receivers.clone(),
        backup.records.clone(),
        backup.events.clone(),
        settings,
        backup.witnesses.state.host().unwrap(),
        Arc::new(backup.witnesses.clone()),
    )
    .unwrap();
    next.recover().await.unwrap();
    assert!(backup.host.names().is_empty());
    assert!(backup.guarded().is_empty());
}

#[tokio::test]
async fn a_healthy_copy_passes_the_audit_epoch_after_epoch() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    for epoch in 2..8 {
        // All that this guest has, also what the next epoch changes.
        let pages: Vec<_> = primary.memory.iter().take(60).map(|(gfn, fill)| (*gfn, *fill)).collect();
        primary.sample(&pages).await;
        primary.epoch(true).await.unwrap();
        primary.settled(&backup, epoch).await;
    }
    assert_eq!(backup.handle().status().state, State::Armed);
    assert!(!backup.told(EventKind::AuditDiffers));
}

#[tokio::test]
async fn a_write_that_the_log_missed_is_an_alarm_and_ends_the_copy() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    // Page 1 is in no later epoch: 1 % (n + 1) is not 0. The guest has something else in it than it sent.
    let truth = primary.memory[&1];
    primary.sample(&[(1, truth), (3, primary.memory[&3])]).await;
    primary.epoch(true).await.unwrap();
    primary.settled(&backup, 2).await;
    primary.sample(&[(1, truth + 100)]).await;
    primary.epoch(true).await.unwrap();
    primary.acked(3).await;
    match primary.event().await {
        LinkEvent::BackupLost { text, .. } => assert!(text.contains("gfn 0x1"), "{text}"),
        other => panic!("{other:?}"),
    }
    backup.reaches(State::Discarded).await;
    assert!(backup.told(EventKind::AuditDiffers));
    assert!(backup.host.names().is_empty(), "a copy that is known to be wrong is never activated (R7)");
}

#[tokio::test]
async fn what_xendomains_starts_here_is_not_accepted() {
    let offer = offer();
    let dir = tempfile::tempdir().unwrap();
    let host = crate::gate::autostart::Xendomains { auto: Some(dir.path().into()), ..Default::default() };
    assert!(checks::check_autostart(&offer, &host).is_ok());
    std::fs::write(dir.path().join("web.cfg"), format!("name = \"{NAME}\"\n")).unwrap();
    assert!(checks::check_autostart(&offer, &host).is_err());
}
