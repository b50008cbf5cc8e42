//! The interface file against the code, and the code against another implementation of varlink (zlink).

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use zlink::idl::{CustomType, Interface, Parameter};
use zlink::varlink_service::Proxy;

use super::server::{Answer, Server, Service, listen};
use super::types::{Caller, DESCRIPTION, INTERFACE, Reply, Request, Role, StatusRow, TargetSpec, Trace};
use super::wire::{Asked, Call};
use super::{ApiError, ErrorCode, MayRun};
use crate::ids::{DomId, Epoch, Generation, ProtectionId};
use crate::ops::operation::{Initiator, Job, JobState, OperationNote, Progress};
use crate::ops::{DomainRef, Event, EventKind, OperationId, OperationKind};
use crate::protect::options::{AutoInterval, ProtectOptions};
use crate::protect::pace::IntervalReport;
use crate::protect::report::EpochReport;
use crate::protect::trace::TracedEpoch;

fn interface() -> Interface<'static> {
    DESCRIPTION.try_into().unwrap()
}

fn names<'a>(parameters: impl Iterator<Item = &'a Parameter<'a>>) -> BTreeSet<String> {
    parameters.map(|p| p.name().to_string()).collect()
}

/// Every request, with every parameter given.
fn requests() -> Vec<Request> {
    let domain = || Some("g".to_owned());
    let (kinds, after, tag) = (Some(vec![EventKind::Protected]), Some(1), Some("t".to_owned()));
    vec![
        Request::Status { domain: domain() },
        Request::WatchStatus { domain: domain() },
        Request::Trace { domain: "g".into(), epochs: Some(3) },
        Request::GetEvents { domain: domain(), kinds: kinds.clone(), after },
        Request::FollowEvents { domain: domain(), kinds, after },
        Request::Jobs {},
        Request::Protect {
            domain: "g".into(),
            target: TargetSpec::default(),
            options: Some(Box::default()),
            foreground: true,
            tag: tag.clone(),
        },
        Request::Unprotect { domain: "g".into(), tag: tag.clone() },
        Request::Failover { domain: "g".into(), primary_is_off: true, tag: tag.clone() },
        Request::Switchover { domain: "g".into(), tag: tag.clone() },
        Request::AssumeAlone { domain: "g".into(), tag: tag.clone() },
        Request::Drill { domain: "g".into(), run_ms: Some(1), tag: tag.clone() },
        Request::Discard { domain: "g".into(), tag: tag.clone() },
        Request::Recover { domain: domain(), assume_owner: true, tag: tag.clone() },
        Request::VerifyDisk { disk: "d".into(), tag },
        Request::Abort { job: OperationId(1), wait: true },
        Request::Reload { domain: domain() },
    ]
}

fn domain() -> DomainRef {
    DomainRef { domid: Some(DomId(1)), name: "g".into(), uuid: ProtectionId::nil() }
}

fn note() -> OperationNote {
    OperationNote {
        id: OperationId(1),
        kind: OperationKind::Protect,
        outcome: "failed".into(),
        code: Some(ErrorCode::Peer),
        tag: Some("t".into()),
    }
}

pub(super) fn event() -> Event {
    Event {
        seq: 1,
        time_ms: 1,
        domain: domain(),
        kind: EventKind::JobFailed,
        detail: "x".into(),
        operation: Some(note()),
    }
}

pub(super) fn row() -> StatusRow {
    StatusRow {
        domain: "g".into(),
        uuid: ProtectionId::nil(),
        domid: Some(DomId(1)),
        role: Role::Primary,
        peer: "b".into(),
        state: "protected".into(),
        protected: true,
        may_run: MayRun::Here,
        generation: Generation(1),
        acked: Some(Epoch(1)),
        acked_age_ms: Some(1),
        stale_ms: Some(1),
        held_packets: 0,
        held_bytes: 0,
        dropped_packets: 0,
        last_epoch: Some(EpochReport::default()),
        interval: Some(IntervalReport::default()),
        detail: String::new(),
    }
}

fn job() -> Job {
    Job {
        id: OperationId(1),
        kind: OperationKind::Protect,
        domain: domain(),
        state: JobState::Running,
        started_ms: 1,
        ran_ms: 1,
        abortable: true,
        detail: String::new(),
        progress: Some(Progress::default()),
        initiator: Some(Initiator { uid: 0, pid: Some(1) }),
    }
}

#[test]
fn every_method_and_parameter_is_in_the_interface_and_the_other_way_round() {
    let interface = interface();
    let mut described: BTreeSet<_> = interface.methods().map(|m| m.name().to_string()).collect();
    for request in requests() {
        let call = Call::of(&request);
        let name = call.method.strip_prefix("org.remus.Control.").unwrap();
        assert!(described.remove(name), "{name} is not in the interface file");
        let method = interface.methods().find(|m| m.name() == name).unwrap();
        let written: BTreeSet<_> = call.parameters.clone().unwrap_or_default().keys().cloned().collect();
        assert_eq!(written, names(method.inputs()), "{name}");
        assert_eq!(call.clone().asked(), Ok(Asked::Ours(Box::new(request))), "{name} comes back as it was");
    }
    assert!(described.is_empty(), "without code: {described:?}");
}

#[test]
fn optional_parameters_may_be_null() {
    let text = json!({ "method": "org.remus.Control.Protect", "parameters": {
        "domain": "g", "target": { "host": "b", "ssh": null }, "options": { "interval_ms": 50, "detection_ms": null, "auto_interval": { "min_gap_ms": null } },
        "foreground": null, "tag": null,
    }});
    let asked = Call::parse(text.to_string().as_bytes()).unwrap().asked();
    let Ok(Asked::Ours(request)) = asked else { panic!("{asked:?}") };
    let Request::Protect { options: Some(options), foreground: false, .. } = *request else { panic!("{request:?}") };
    let auto_interval = Some(AutoInterval::default());
    assert_eq!(*options, ProtectOptions { interval_ms: 50, auto_interval, ..ProtectOptions::default() });
}

/// The members of every object that travels, against its type in the interface file.
#[test]
fn every_type_has_the_members_that_are_written() {
    let interface = interface();
    let rows = [
        ("Domain", json!(domain())),
        ("Target", json!(TargetSpec::default())),
        (
            "ProtectOptions",
            json!(ProtectOptions {
                auto_interval: Some(AutoInterval::default()),
                netbuffer_script: Some("/x".into()),
                disk_scripts: [("xvda".into(), "/x".into())].into(),
                witness: Some("x".into()),
                ..ProtectOptions::default()
            }),
        ),
        ("Epoch", json!(EpochReport::default())),
        ("TracedEpoch", json!(TracedEpoch::default())),
        ("Interval", json!(IntervalReport::default())),
        ("AutoInterval", json!(AutoInterval::default())),
        ("Row", json!(row())),
        ("JobNote", json!(note())),
        ("Event", json!(event())),
        ("Progress", json!(Progress::default())),
        ("Initiator", json!(Initiator { uid: 0, pid: Some(1) })),
        ("Job", json!(job())),
    ];
    for (name, value) in rows {
        let Some(CustomType::Object(object)) = interface.custom_types().find(|t| t.name() == name) else {
            panic!("no type {name}")
        };
        let described: BTreeSet<_> = object.fields().map(|f| f.name().to_string()).collect();
        let written: BTreeSet<_> = value.as_object().unwrap().keys().cloned().collect();
        assert_eq!(written, described, "{name}");
    }
    let kinds: Vec<Value> = EventKind::ALL.iter().map(|kind| json!(kind)).collect();
    assert_eq!(kinds, values(&interface, "EventKind"));
    let jobs: Vec<Value> = OperationKind::ALL.iter().map(|kind| json!(kind)).collect();
    assert_eq!(jobs, values(&interface, "JobKind"));
    for (kind, name) in OperationKind::ALL.iter().zip(jobs) {
        assert_eq!(json!(kind.to_string()), name, "the same word everywhere");
    }
    for value in values(&interface, "ErrorCode") {
        let _: ErrorCode = serde_json::from_value(value).unwrap();
    }
}

/// The answer of a method that has one type in the code.
#[test]
fn a_trace_is_answered_as_it_is_described() {
    let interface = interface();
    let method = interface.methods().find(|m| m.name() == "Trace").unwrap();
    let trace = json!(Trace { domain: domain(), peer: "b".into(), epochs: vec![TracedEpoch::default()] });
    let written: BTreeSet<_> = trace.as_object().unwrap().keys().cloned().collect();
    assert_eq!(written, names(method.outputs()));
    let asked = Request::Trace { domain: "g".into(), epochs: None };
    assert!(!asked.acts(), "whoever may read the status may read this");
}

fn values(interface: &Interface<'_>, name: &str) -> Vec<Value> {
    match interface.custom_types().find(|t| t.name() == name) {
        Some(CustomType::Enum(of)) => of.variants().map(|variant| json!(variant.name().to_string())).collect(),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn every_error_is_in_the_interface() {
    let described: BTreeSet<_> = interface().errors().map(|e| e.name().to_string()).collect();
    let codes = values(&interface(), "ErrorCode");
    assert_eq!(described.len(), codes.len());
    for value in codes {
        let error = ApiError::new(serde_json::from_value(value).unwrap(), "x");
        let message = Reply::Error(error.clone()).message();
        let name = message["error"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
        assert!(described.contains(&name), "{name}");
        assert_eq!(Reply::parse(message.to_string().as_bytes()), Ok(Reply::Error(error)));
    }
}

struct Fake;

impl Service for Fake {
    async fn handle(self: Arc<Self>, _: Request, _: Caller, answer: Answer) -> Result<Value, ApiError> {
        answer.send(Reply::Event(event())).await;
        answer.send(Reply::Missed(2)).await;
        Ok(json!({}))
    }
}

/// A client of somebody else's making: introspection, and a stream of replies.
#[tokio::test]
async fn another_implementation_understands_us() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = listen(&path).await.unwrap();
    tokio::spawn(Server::default().serve(listener, Arc::new(Fake)));
    let mut connection = zlink::tokio::unix::connect(&path).await.unwrap();

    let info = connection.get_info().await.unwrap().unwrap();
    assert_eq!(info.interfaces.iter().map(ToString::to_string).collect::<Vec<_>>(), ["org.varlink.service", INTERFACE]);
    let described = connection.get_interface_description(INTERFACE.try_into().unwrap()).await.unwrap().unwrap();
    let parsed = described.parse().unwrap();
    assert!(parsed.methods().any(|m| m.name() == "FollowEvents"));
    let own = connection.get_interface_description("org.varlink.service".try_into().unwrap()).await.unwrap().unwrap();
    assert_eq!(own.parse().unwrap().methods().count(), 2);
    assert!(connection.get_interface_description("no.such".try_into().unwrap()).await.is_err());

    #[derive(Debug, serde::Serialize)]
    #[serde(tag = "method", content = "parameters")]
    enum Method {
        #[serde(rename = "org.remus.Control.FollowEvents")]
        FollowEvents { domain: Option<String> },
    }
    #[derive(Debug, serde::Deserialize)]
    struct Followed {
        event: Option<Event>,
        missed: Option<u64>,
    }
    #[derive(Debug, serde::Deserialize)]
    struct Failed {
        #[expect(dead_code, reason = "tells an error from a reply")]
        error: String,
    }
    let call = zlink::Call::new(Method::FollowEvents { domain: None }).set_more(true);
    connection.send_call(&call, vec![]).await.unwrap();
    let mut got = Vec::new();
    loop {
        let (reply, _) = connection.receive_reply::<Followed, Failed>().await.unwrap();
        let reply = reply.unwrap();
        let goes_on = reply.continues() == Some(true);
        got.push(reply.into_parameters().map(|f| (f.event, f.missed)));
        if !goes_on {
            break;
        }
    }
    assert_eq!(got, [Some((Some(event()), None)), Some((None, Some(2))), Some((None, None))]);
}
