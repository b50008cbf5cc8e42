//! Drills: whole flows with the played receiver, and the snapshot that later epochs must not reach.

use super::fake::Behaviour;
use super::*;
use crate::backup::drill::snapshot::Snapshot;
use crate::backup::incoming::domain_ref;
use crate::backup::{DrillError, DrillReport};
use crate::ops::operation::Spec;
use crate::ops::{How, OperationKind, Operations};

const RUN: Duration = Duration::from_millis(20);

async fn drill(backup: &Backup) -> Result<DrillReport, DrillError> {
    let operations = Operations::new(backup.events.clone());
    let domain = domain_ref(UUID, NAME, None);
    let (initiation, work) = operations.begin(Spec::new(OperationKind::Drill, domain), How::Silent).unwrap();
    initiation.begun();
    backup.registry.drill(&backup.handle(), RUN, &work).await
}

#[tokio::test]
async fn the_last_epoch_is_started_apart_and_destroyed_and_protection_goes_on() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    let (expected, state) = (primary.memory.clone(), Bytes::from(1u64.to_le_bytes().to_vec()));
    let report = drill(&backup).await.unwrap();
    assert_eq!((report.epoch, report.pages, report.cpu_ms), (Epoch(1), 200, 7));
    assert!(report.ran_ms >= 20);
    let destroyed = backup.host.destroyed.lock().unwrap().clone();
    assert_eq!(destroyed, [("web--drill".to_owned(), expected, Some(state), true)]);
    assert_eq!(backup.host.names(), ["web--incoming"], "the copy is only read");
    assert!(backup.told(EventKind::Drilled) && !backup.told(EventKind::Activated));
    assert!(backup.host.opened.lock().unwrap().is_empty(), "no interface of anybody was opened");
    primary.epoch(true).await.unwrap();
    primary.acked(2).await;
    assert_eq!(drill(&backup).await.unwrap().epoch, Epoch(2), "and again");
}

#[tokio::test]
async fn a_copy_that_would_not_run_is_an_alarm_that_says_how() {
    type Break = fn(&Backup);
    let breaks: [(Break, &str); 5] = [
        (|b| b.receivers.behave(Behaviour { dead_on_arrival: true, ..Behaviour::default() }), "cannot be started"),
        (|b| b.receivers.behave(Behaviour { die_at_end: true, ..Behaviour::default() }), "could not be built"),
        (|b| *b.host.crashes.lock().unwrap() = true, "ended within"),
        (|b| *b.host.idle.lock().unwrap() = true, "did nothing"),
        (|b| *b.host.mute.lock().unwrap() = true, "does not answer"),
    ];
    for (spoil, words) in breaks {
        let backup = Backup::new();
        let mut primary = Primary::armed(&backup).await;
        spoil(&backup);
        match drill(&backup).await {
            Err(DrillError::Failed(text)) => assert!(text.contains(words), "{words}: {text}"),
            other => panic!("{words}: {other:?}"),
        }
        assert!(backup.told(EventKind::DrillFailed), "{words}");
        assert_eq!(backup.host.names(), ["web--incoming"], "{words}");
        primary.epoch(true).await.unwrap();
        primary.acked(2).await;
    }
}

#[tokio::test]
async fn without_room_or_a_whole_epoch_nothing_is_begun() {
    let backup = Backup::new();
    let primary = Primary::begin(&backup).await;
    assert!(matches!(drill(&backup).await, Err(DrillError::Refused(text)) if text.contains("whole")));
    drop(primary);

    let backup = Backup::new();
    let _primary = Primary::armed(&backup).await;
    *backup.host.free_kib.lock().unwrap() = Some(64 * 1024);
    assert!(matches!(drill(&backup).await, Err(DrillError::Refused(text)) if text.contains("64 MiB free")));
    assert!(!backup.told(EventKind::DrillFailed), "that says nothing about the copy");
    assert!(backup.host.destroyed.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_activation_ends_a_drill_at_once() {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    let operations = Operations::new(backup.events.clone());
    let spec = Spec::new(OperationKind::Drill, domain_ref(UUID, NAME, None));
    let (initiation, work) = operations.begin(spec, How::Silent).unwrap();
    initiation.begun();
    let (registry, handle) = (backup.registry.clone(), backup.handle());
    let long = tokio::spawn(async move { registry.drill(&handle, Duration::from_secs(600), &work).await });
    let mut backoff =
        crate::ops::Backoff::new(Duration::from_millis(1), Duration::from_millis(20), Duration::from_secs(10)).unwrap();
    while backup.host.running("web--drill").is_none() {
        backoff.wait().await.unwrap();
    }
    drop(primary);
    backup.hears(EventKind::PrimarySuspect).await;
    while !backup.handle().status().suspect && backup.handle().status().link_open {
        backoff.wait().await.unwrap();
    }
    backup.handle().failover(true).await.unwrap();
    assert!(matches!(long.await.unwrap(), Err(DrillError::Interrupted(_))));
    assert_eq!(backup.host.names(), [NAME]);
}

#[tokio::test]
async fn what_later_epochs_overwrite_is_put_aside_first() {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    let expected = primary.memory.clone();
    let domid = backup.handle().status().domid.unwrap();
    // Acknowledged is not yet applied: every second page has what epoch 1 wrote.
    backup.host.applied(domid, 100, 2).await;
    let host: Arc<dyn BackupHost> = backup.host.clone();
    let snapshot = Snapshot::new(host, domid, 16);
    let mut seen = BTreeMap::new();
    let mut reads = 0;
    while let Some(batch) = snapshot.next(250).await.unwrap() {
        seen.extend(batch.entries.iter().zip(batch.data.chunks(PAGE_SIZE)).map(|(gfn, page)| (*gfn, page[0])));
        // Pages that are read already, that are not, one that is new, and one twice.
        let written: Vec<u64> = (reads * 7..250).step_by(3).chain([230]).collect();
        snapshot.preserve(&written).await;
        backup.host.overwrite(domid, &written, 0xee);
        reads += 1;
    }
    assert_eq!(reads, 16);
    assert_eq!(seen, expected);
}
