use super::*;
use crate::api::ErrorCode;
use crate::ids::{DomId, Epoch, Generation, ProtectionId};
use crate::ops::operation::{Initiator, OperationNote, Progress};
use crate::ops::{DomainRef, OperationId, OperationKind};
use crate::protect::pace::IntervalReport;
use crate::protect::report::EpochReport;

/// A guest that is protected.
pub(in crate::cli) fn primary() -> StatusRow {
    StatusRow {
        domain: "web".into(),
        uuid: ProtectionId::from_u128(1),
        domid: Some(DomId(3)),
        role: Role::Primary,
        peer: "hostb".into(),
        state: "protected".into(),
        protected: true,
        may_run: MayRun::Here,
        generation: Generation(4),
        acked: Some(Epoch(812)),
        acked_age_ms: Some(120),
        stale_ms: Some(184),
        held_packets: 12,
        held_bytes: 9000,
        dropped_packets: 0,
        last_epoch: Some(EpochReport {
            epoch: Epoch(812),
            armed: true,
            capture_us: 2900,
            resume_us: 300,
            ..EpochReport::default()
        }),
        interval: Some(IntervalReport { auto: true, mean_ms: Some(43), by_output: 90, ..IntervalReport::default() }),
        detail: String::new(),
    }
}

/// One that is not.
pub(in crate::cli) fn unprotected() -> StatusRow {
    StatusRow {
        domain: "database".into(),
        uuid: ProtectionId::from_u128(2),
        state: "unprotected".into(),
        protected: false,
        stale_ms: None,
        last_epoch: None,
        interval: Some(IntervalReport::default()),
        detail: "UNPROTECTED: silence for 1000 ms".into(),
        ..primary()
    }
}

/// A copy.
pub(in crate::cli) fn backup() -> StatusRow {
    StatusRow {
        domain: "mail".into(),
        uuid: ProtectionId::from_u128(3),
        role: Role::Backup,
        peer: "hostc".into(),
        state: "armed".into(),
        may_run: MayRun::Peer,
        stale_ms: Some(75_000),
        last_epoch: None,
        interval: None,
        detail: "nothing is heard from the primary".into(),
        ..primary()
    }
}

fn event(kind: EventKind, detail: &str, operation: Option<OperationNote>) -> Event {
    let domain = DomainRef { domid: Some(DomId(3)), name: "web".into(), uuid: ProtectionId::from_u128(1) };
    Event { seq: 7, time_ms: 1_795_261_754_003, domain, kind, detail: detail.into(), operation }
}

#[test]
fn status_is_a_line_for_each_protection() {
    let holding = StatusRow {
        state: "holding".into(),
        may_run: MayRun::Undecided,
        detail: "UNPROTECTED and output is held".into(),
        ..unprotected()
    };
    let ended = StatusRow {
        state: "superseded".into(),
        may_run: MayRun::Peer,
        detail: "it runs there".into(),
        ..unprotected()
    };
    let runs = StatusRow {
        protected: false,
        state: "active".into(),
        may_run: MayRun::Here,
        stale_ms: None,
        detail: String::new(),
        ..backup()
    };
    let rows = [primary(), unprotected(), holding, ended, backup(), runs];
    let text = status(&rows, Paint(false));
    assert_eq!(text.lines().count(), rows.len() + 1);
    insta::assert_snapshot!(text);
    insta::assert_snapshot!("no_status", status(&[], Paint(false)));
}

#[test]
fn jobs_say_whether_they_can_be_aborted() {
    let job = Job {
        id: OperationId(5),
        kind: OperationKind::Protect,
        domain: event(EventKind::Protected, "", None).domain,
        state: JobState::Running,
        started_ms: 1_795_261_754_003,
        ran_ms: 4200,
        abortable: true,
        detail: String::new(),
        progress: Some(Progress { pages: 300, total: 1000, bytes: 1 << 20 }),
        initiator: Some(Initiator { uid: 0, pid: Some(77) }),
    };
    let failover = Job {
        id: OperationId(6),
        kind: OperationKind::Failover,
        state: JobState::Failed,
        abortable: false,
        detail: "the name is taken".into(),
        progress: None,
        initiator: None,
        ..job.clone()
    };
    let sync = Job {
        kind: OperationKind::DiskSync,
        progress: Some(Progress { pages: 84 << 20, total: 420 << 20, bytes: 1 << 20 }),
        ..job.clone()
    };
    let text = jobs(std::slice::from_ref(&sync), Paint(false));
    assert!(text.contains("20 % of 420 MiB, 20 MiB/s, 16 s to go"), "{text}");
    let stuck = Job { progress: Some(Progress { total: 420 << 20, ..Progress::default() }), ..sync.clone() };
    assert!(jobs(&[stuck], Paint(false)).contains("0 % of 420 MiB, 0 B/s "), "nobody knows for how long");
    let done = Job { state: JobState::Completed, ..sync };
    assert!(!jobs(&[done], Paint(false)).contains("to go"));
    insta::assert_snapshot!(jobs(&[job, failover], Paint(false)));
}

#[test]
fn events_are_lines_and_alarms_are_loud() {
    let note = OperationNote {
        id: OperationId(5),
        kind: OperationKind::Protect,
        outcome: "failed".into(),
        code: Some(ErrorCode::Peer),
        tag: Some("mine".into()),
    };
    let lines = [
        event(EventKind::Protected, "epoch 2 is held by hostb", None),
        event(EventKind::Unprotected, "the backup is lost", None),
        event(EventKind::OperationComplete, "job 5, protect: hostb refuses", Some(note)),
    ];
    let text: Vec<_> = lines.iter().map(|e| super::event(e, Paint(false))).collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn colours_are_for_terminals() {
    let rows = [primary(), unprotected()];
    assert!(!status(&rows, Paint(false)).contains('\x1b'));
    let painted = status(&rows, Paint(true));
    assert!(painted.contains("\x1b[32m") && painted.contains("\x1b[31m"), "{painted}");
}

#[test]
fn figures_have_units_that_suit_them() {
    let ages = [9_999, 10_000, 600_000, 36_000_000].map(age);
    assert_eq!(ages, ["9999 ms", "10 s", "10 min", "10 h"]);
    let sizes = [10_239, 10_240, 10 << 20, 10 << 30].map(size);
    assert_eq!(sizes, ["10239 B", "10 KiB", "10 MiB", "10 GiB"]);
}
