use clap::Parser;
use proptest::prelude::*;

use super::chrome::{TraceEvent, Track, document};
use super::*;
use crate::cli::args::{Args, Command};
use crate::ids::{DomId, Epoch, ProtectionId};
use crate::ops::DomainRef;
use crate::protect::report::EpochReport;
use crate::protect::trace::TracedEpoch;

fn trace(epochs: Vec<TracedEpoch>) -> Trace {
    let domain = DomainRef { domid: Some(DomId(3)), name: "web".into(), uuid: ProtectionId::from_u128(1) };
    Trace { domain, peer: "hostb".into(), epochs }
}

/// An epoch of the native engine.
fn native() -> TracedEpoch {
    let report = EpochReport {
        epoch: Epoch(812),
        armed: true,
        suspend_us: 900,
        capture_us: 2900,
        postsuspend_us: 400,
        log_us: Some(200),
        copy_us: Some(1900),
        state_us: Some(250),
        resume_us: 300,
        preresume_us: 40,
        encode_us: 700,
        send_us: 5200,
        ack_us: 1100,
        commit_us: 60,
        pages: 1000,
        bytes: 1_400_000,
    };
    TracedEpoch { start_us: 1_795_261_754_003_000, encode_at_us: Some(1600), commit_at_us: 10_450, report }
}

#[test]
fn an_epoch_is_drawn_on_four_tracks() {
    let helper =
        EpochReport { epoch: Epoch(813), armed: false, log_us: None, copy_us: None, state_us: None, ..native().report };
    let unarmed = TracedEpoch { start_us: native().start_us + 200_000, encode_at_us: None, report: helper, ..native() };
    let drawn = serde_json::to_value(document(&trace(vec![native(), unarmed]))).unwrap();
    let members: Vec<_> = drawn.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(members, ["displayTimeUnit", "otherData", "traceEvents"]);
    assert_eq!((&drawn["displayTimeUnit"], &drawn["otherData"]["peer"]), (&"ms".into(), &"hostb".into()));
    let text: Vec<_> = drawn["traceEvents"].as_array().unwrap().iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn what_was_typed_is_asked_for() {
    let typed = |line: &str| Args::try_parse_from(line.split(' ')).map_err(|error| error.to_string());
    let request = |line: &str| typed(line).unwrap().request().unwrap();
    assert_eq!(request("remus trace web"), crate::api::Request::Trace { domain: "web".into(), epochs: Some(10) });
    assert_eq!(
        request("remus trace web --epochs 64"),
        crate::api::Request::Trace { domain: "web".into(), epochs: Some(64) }
    );
    let Command::Trace(args) = typed("remus trace web -n 3 --output t.json").unwrap().command else {
        panic!("not a trace")
    };
    assert_eq!((args.epochs, args.output), (3, Some("t.json".into())));
    assert!(typed("remus trace").is_err() && typed("remus trace web --epochs 0").unwrap_err().contains("--epochs"));
}

#[test]
fn a_file_is_written_where_it_was_said_or_the_place_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("t.json");
    let args = TraceArgs { domain: "web".into(), epochs: 10, output: Some(output.clone()) };
    let said = show(&args, &trace(vec![native()])).unwrap().unwrap();
    assert!(said.starts_with("1 epoch of web in ") && said.contains("perfetto"), "{said}");
    let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    assert_eq!(read["displayTimeUnit"], "ms");
    let nowhere = TraceArgs { output: Some(output.join("x")), ..args };
    let error = show(&nowhere, &trace(vec![native()])).unwrap_err();
    assert!(error.code == ErrorCode::Failed && error.message.contains("t.json/x"), "{error}");
}

/// Epochs one after the other, with gaps between them; parts of a part need not fit into it.
fn epochs() -> impl Strategy<Value = Vec<TracedEpoch>> {
    let us = || prop_oneof![Just(0), 1..5000_u64];
    let some = || prop::option::of(us());
    let pause = (us(), us(), us(), some(), some(), some(), us(), us());
    let rest = (us(), us(), us(), us(), us(), some(), any::<bool>(), us());
    prop::collection::vec((pause, rest), 1..6).prop_map(|all| {
        let mut start_us = 1_795_261_754_003_000;
        let mut epochs = Vec::new();
        for (number, (pause, rest)) in all.into_iter().enumerate() {
            let (suspend_us, capture_us, postsuspend_us, log_us, copy_us, state_us, resume_us, preresume_us) = pause;
            let (encode_us, send_us, ack_us, commit_us, late, encode_at_us, armed, gap) = rest;
            let report = EpochReport {
                epoch: Epoch(number as u64),
                armed,
                suspend_us,
                capture_us,
                postsuspend_us,
                log_us,
                copy_us,
                state_us,
                resume_us,
                preresume_us,
                encode_us,
                send_us,
                ack_us,
                commit_us,
                ..EpochReport::default()
            };
            let commit_at_us = suspend_us + capture_us + resume_us + send_us + ack_us + late;
            epochs.push(TracedEpoch { start_us, encode_at_us, commit_at_us, report });
            start_us += commit_at_us + commit_us + gap;
        }
        epochs
    })
}

/// Beginning and end.
fn span(event: &TraceEvent) -> (u64, u64) {
    let from = event.ts.unwrap();
    (from, from + event.dur.unwrap())
}

/// The sum of the events of this name in one epoch.
fn sum(events: &[TraceEvent], epoch: u64, names: &[&str]) -> u64 {
    let of_epoch = events.iter().filter(|event| event.ph == "X" && event.args["epoch"] == epoch);
    of_epoch.filter(|event| names.contains(&event.name)).map(|event| event.dur.unwrap()).sum()
}

proptest! {
    #[test]
    fn events_of_a_track_are_apart_or_within_each_other(epochs in epochs()) {
        let events = document(&trace(epochs)).trace_events;
        for track in Track::ALL {
            let spans: Vec<_> =
                events.iter().filter(|event| event.ph == "X" && event.tid == track as u32).map(span).collect();
            for (place, &(from, to)) in spans.iter().enumerate() {
                for &(later_from, later_to) in &spans[place + 1..] {
                    // A viewer takes the first of two that begin together as the outer one.
                    let (apart, within) = (later_from >= to, later_from >= from && later_to <= to);
                    prop_assert!(apart || within, "{track:?}: {:?} and {:?}", (from, to), (later_from, later_to));
                }
            }
        }
    }

    #[test]
    fn events_sum_up_to_the_report(epochs in epochs()) {
        let events = document(&trace(epochs.clone())).trace_events;
        for TracedEpoch { start_us, report, commit_at_us, .. } in &epochs {
            let sum = |names: &[&str]| sum(&events, report.epoch.0, names);
            prop_assert_eq!(sum(&["freeze"]), report.suspend_us);
            prop_assert_eq!(sum(&["paused"]), report.paused_us());
            prop_assert_eq!((sum(&["capture"]), sum(&["resume"])), (report.capture_us, report.resume_us));
            prop_assert!(sum(&["postsuspend", "log", "copy", "state"]) <= report.capture_us);
            prop_assert!(sum(&["preresume"]) <= report.resume_us);
            prop_assert_eq!((sum(&["send"]), sum(&["ack"])), (report.send_us, report.ack_us));
            prop_assert_eq!(sum(&["commit"]), report.commit_us);
            let of_epoch = events.iter().filter(|event| event.ph == "X" && event.args["epoch"] == report.epoch.0);
            let (first, last) = of_epoch.map(span).fold((u64::MAX, 0), |(a, b), (from, to)| (a.min(from), b.max(to)));
            prop_assert_eq!((first, last), (*start_us, start_us + commit_at_us + report.commit_us));
            let closed = report.suspend_us + report.postsuspend_us.min(report.capture_us);
            prop_assert_eq!(sum(&["held"]), if report.armed { commit_at_us - closed } else { 0 });
        }
    }
}
