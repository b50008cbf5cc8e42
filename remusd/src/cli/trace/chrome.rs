//! Epochs in the JSON Object Format of the Trace Event Format, which chrome://tracing and Perfetto open
//! (<https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>): complete events (`X`) on one track ("thread")
//! for each that works on an epoch, and metadata events (`M`) that name them. Times are microseconds.

use serde::Serialize;
use serde_json::{Value, json};

use crate::api::Trace;
use crate::protect::trace::TracedEpoch;

/// There is one process in the file: the protection.
const PROTECTION: u32 = 1;

/// Who works on an epoch; the value is the thread id and the order from above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Track {
    Guest = 1,
    Capture = 2,
    Link = 3,
    Output = 4,
}

impl Track {
    pub(super) const ALL: [Self; 4] = [Self::Guest, Self::Capture, Self::Link, Self::Output];

    fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Capture => "dom0: capture",
            Self::Link => "link",
            Self::Output => "output",
        }
    }
}

/// The whole file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    pub(super) trace_events: Vec<TraceEvent>,
    display_time_unit: &'static str,
    other_data: Value,
}

/// One event of either kind.
#[derive(Debug, Serialize)]
pub(super) struct TraceEvent {
    pub(super) name: &'static str,
    pub(super) ph: &'static str,
    pid: u32,
    pub(super) tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ts: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dur: Option<u64>,
    pub(super) args: Value,
}

/// What the epochs look like.
pub(super) fn document(trace: &Trace) -> Document {
    let mut trace_events = names(trace);
    for epoch in &trace.epochs {
        slices(epoch, &mut trace_events);
    }
    let other_data = json!({
        "domain": trace.domain.name, "uuid": trace.domain.uuid, "peer": trace.peer, "writer": concat!("remus ", env!("CARGO_PKG_VERSION")),
    });
    Document { trace_events, display_time_unit: "ms", other_data }
}

fn names(trace: &Trace) -> Vec<TraceEvent> {
    let meta = |name, tid, args| TraceEvent { name, ph: "M", pid: PROTECTION, tid, ts: None, dur: None, args };
    let process = format!("{} -> {}", trace.domain.name, trace.peer);
    let mut events = vec![meta("process_name", 0, json!({ "name": process }))];
    for track in Track::ALL {
        events.push(meta("thread_name", track as u32, json!({ "name": track.name() })));
        events.push(meta("thread_sort_index", track as u32, json!({ "sort_index": track as u32 })));
    }
    events
}

/// The events of one epoch: on each track one after the other, and an outer one before those within it.
fn slices(traced: &TracedEpoch, events: &mut Vec<TraceEvent>) {
    let report = &traced.report;
    let epoch = report.epoch.0;
    let mut put = |track: Track, name, from: u64, to: u64, args: Value| {
        let (ts, dur) = (Some(from), Some(to.saturating_sub(from)));
        events.push(TraceEvent { name, ph: "X", pid: PROTECTION, tid: track as u32, ts, dur, args });
    };
    let plain = || json!({ "epoch": epoch });
    let asked = traced.start_us;
    let suspended = asked + report.suspend_us;
    let copied = suspended + report.capture_us;
    let resumed = copied + report.resume_us;
    let sent = resumed + report.send_us;
    let acked = sent + report.ack_us;
    let committing = acked.max(asked + traced.commit_at_us);

    put(Track::Guest, "freeze", asked, suspended, plain());
    put(Track::Guest, "paused", suspended, resumed, json!({ "epoch": epoch, "report": report }));

    put(Track::Capture, "capture", suspended, copied, json!({ "epoch": epoch, "pages": report.pages }));
    let closed = copied.min(suspended + report.postsuspend_us);
    put(Track::Capture, "postsuspend", suspended, closed, plain());
    match (report.log_us, report.copy_us, report.state_us) {
        // The save helper does not tell: it is all one.
        (None, None, None) => put(Track::Capture, "copy", closed, copied, plain()),
        (log, copy, state) => {
            let mut at = closed;
            for (name, took) in [("log", log), ("copy", copy), ("state", state)] {
                let end = copied.min(at + took.unwrap_or_default());
                put(Track::Capture, name, at, end, plain());
                at = end;
            }
        }
    }
    put(Track::Capture, "resume", copied, resumed, plain());
    put(Track::Capture, "preresume", copied, resumed.min(copied + report.preresume_us), plain());

    if let Some(from) = traced.encode_at_us.map(|at| asked + at).filter(|from| *from < resumed) {
        put(Track::Link, "encode", from, resumed, json!({ "epoch": epoch, "encode_us": report.encode_us }));
    }
    put(Track::Link, "send", resumed, sent, json!({ "epoch": epoch, "bytes": report.bytes }));
    put(Track::Link, "ack", sent, acked, plain());

    if report.armed {
        put(Track::Output, "held", closed, committing, plain());
    }
    put(Track::Output, "commit", committing, committing + report.commit_us, plain());
}
