//! `remus trace` as the daemon answers it.

use std::time::Instant;

use super::*;
use crate::ids::Epoch;
use crate::protect::report::EpochReport;
use crate::protect::trace::Finished;

#[tokio::test]
async fn a_trace_has_the_newest_epochs_or_says_why_there_is_none() {
    let fixture = Fixture::new().await;
    let error = |typed: &'static str, epochs| {
        let daemon = fixture.daemon.clone();
        async move { daemon.trace(typed, epochs).await.unwrap_err().code }
    };
    assert_eq!(error("web", None).await, ErrorCode::NotFound);
    let script = fixture.protected().await;
    assert_eq!(error("web", None).await, ErrorCode::Conflict, "nothing is captured yet");
    assert_eq!(error("db", None).await, ErrorCode::NotFound);
    let ring = fixture.daemon.primaries.lock().await[&WEB].handle.trace.clone();
    for epoch in 0..20 {
        let report = EpochReport { epoch: Epoch(epoch), ..EpochReport::default() };
        ring.push(Finished { asked: Instant::now(), encoding: None, committing: Instant::now(), report });
    }
    assert_eq!(error("web", Some(0)).await, ErrorCode::Invalid);
    for typed in ["web", "3", &WEB.to_string()] {
        let trace = fixture.daemon.trace(typed, Some(2)).await.unwrap();
        let numbers: Vec<_> = trace.epochs.iter().map(|epoch| epoch.report.epoch.0).collect();
        assert_eq!((trace.domain, numbers), (domain(), vec![18, 19]));
    }
    script.end(Outcome::Alone("the backup is lost".into()));
    assert_eq!(fixture.daemon.trace("web", None).await.unwrap().epochs.len(), 10, "the last words count most");
    assert_eq!(fixture.daemon.trace("web", Some(1000)).await.unwrap().epochs.len(), 20);
}

#[tokio::test]
async fn a_host_that_keeps_the_copy_says_so() {
    let fixture = Fixture::with(true).await;
    let error = fixture.daemon.trace(fixture.backup.name, None).await.unwrap_err();
    assert!(error.code == ErrorCode::NotFound && error.message.contains("its copy is kept here"), "{error}");
}
