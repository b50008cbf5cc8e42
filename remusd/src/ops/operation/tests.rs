use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::machine::{Effect, Input, Machine, Phase};
use super::*;
use crate::ids::{DomId, ProtectionId};
use crate::ops::{DomainRef, ErrorCode, EventKind, EventLog, Failure, Filter};

pub(super) fn domain() -> DomainRef {
    DomainRef { domid: Some(DomId(3)), name: "g".into(), uuid: ProtectionId::nil() }
}

pub(super) fn spec() -> Spec {
    Spec::new(OperationKind::Protect, domain())
}

pub(super) fn operations() -> (Operations, Arc<EventLog>) {
    let log = Arc::new(EventLog::default());
    (Operations::new(log.clone()), log)
}

fn kinds(log: &EventLog) -> Vec<EventKind> {
    log.kept(&Filter::default()).iter().map(|event| event.kind).collect()
}

#[test]
fn table_is_true() {
    let mut now = String::from(
        "# The phases of an operation\n\nEvery phase against every input: the next phase and the effects, in order. A pair that is not \
         listed changes nothing. Written by `ops::operation::tests::table_is_true`; run it with `BLESS=1` to renew.\n\n\
         | phase | input | next | effects |\n|---|---|---|---|\n",
    );
    for phase in Phase::ALL {
        for input in Input::ALL {
            let mut machine = Machine::at(phase);
            let effects = machine.step(input);
            if effects.is_empty() && machine.phase() == phase {
                continue;
            }
            let list: Vec<_> = effects.iter().map(|e| format!("{e:?}")).collect();
            now += &format!("| {phase:?} | {input:?} | {:?} | {} |\n", machine.phase(), list.join(", "));
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/operation/states.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == now, "states.md differs from the code; read the change, then run with BLESS=1:\n{now}");
}

/// Every sequence of six inputs.
#[test]
fn the_machine_keeps_its_promises_for_every_sequence_of_inputs() {
    fn walk(machine: Machine, seen: &mut Vec<(Input, &'static [Effect])>, left: usize) {
        check(seen);
        if left == 0 {
            return;
        }
        for input in Input::ALL {
            let mut next = machine;
            let effects = next.step(input);
            seen.push((input, effects));
            walk(next, seen, left - 1);
            seen.pop();
        }
    }
    fn check(seen: &[(Input, &'static [Effect])]) {
        let count = |effect: Effect| seen.iter().flat_map(|(_, e)| e.iter()).filter(|e| **e == effect).count();
        let first = |input: Input| seen.iter().position(|(i, _)| *i == input);
        assert!(count(Effect::Deliver) <= 1 && count(Effect::KeepOutcome) <= 1, "{seen:?}");
        let began = match (first(Input::Begun), first(Input::InitiationFailed)) {
            (Some(begun), Some(failed)) => begun < failed,
            (begun, _) => begun.is_some(),
        };
        let ended = first(Input::WorkEnded).is_some() || first(Input::GivenUp).is_some();
        assert_eq!(count(Effect::Deliver) == 1, began && ended, "exactly once, if begun and ended: {seen:?}");
        for (n, (input, effects)) in seen.iter().enumerate() {
            let before = &seen[..n];
            match input {
                // Whoever was told that it is asked for, the work knows.
                Input::Abort if effects.contains(&Effect::AbortAsked) => {
                    let told = seen[..=n].iter().any(|(_, e)| e.contains(&Effect::TellWork));
                    assert!(told, "{seen:?}");
                }
                // Past this point the work is never told to give up, but by the daemon's end or a failed initiation.
                Input::PointOfNoReturn if effects.contains(&Effect::Proceed) => {
                    assert!(!before.iter().any(|(_, e)| e.contains(&Effect::AbortAsked)), "{seen:?}");
                    assert!(!seen[n..].iter().any(|(_, e)| e.contains(&Effect::AbortAsked)), "{seen:?}");
                }
                _ => {}
            }
        }
    }
    walk(Machine::default(), &mut Vec::new(), 6);
}

#[tokio::test]
async fn waiting_gets_the_outcome_and_everybody_gets_one_job_event() {
    let (operations, log) = operations();
    let (how, waiter) = How::wait();
    let (initiation, work) = operations.begin(spec(), how).unwrap();
    let id = initiation.begun();
    work.complete(Outcome::done("well"));
    assert_eq!(waiter.outcome().await, Outcome::done("well"));
    assert_eq!(kinds(&log), [EventKind::JobCompleted]);
    assert_eq!(operations.ended(id).await.unwrap().message(), "well");
    assert_eq!(operations.jobs()[0].state, JobState::Completed);
}

#[tokio::test]
async fn an_event_carries_the_initiators_tag() {
    let (operations, log) = operations();
    let (initiation, work) = operations.begin(spec(), How::Event { tag: "mine-7".into() }).unwrap();
    initiation.begun();
    work.complete(Outcome::Failed(Failure::new(ErrorCode::Peer, "refused")));
    let events = log.kept(&Filter::default());
    assert_eq!(events.iter().map(|e| e.kind).collect::<Vec<_>>(), [EventKind::JobFailed, EventKind::OperationComplete]);
    let note = events[1].operation.clone().unwrap();
    assert_eq!((note.tag.as_deref(), note.code), (Some("mine-7"), Some(ErrorCode::Peer)));
    assert_eq!(events[0].operation.clone().unwrap().tag, None, "the tag is the initiator's alone");
}

/// Re-entrancy: the callback runs on its own task, so it may begin another operation, ask for jobs and publish.
#[tokio::test]
async fn a_callback_may_use_everything_and_never_runs_inside_the_initiator() {
    let (operations, log) = operations();
    let (said, mut heard) = mpsc::unbounded_channel();
    let (inner, inner_log, inner_said) = (operations.clone(), log.clone(), said.clone());
    let how = How::callback(move |outcome| {
        inner_log.publish(domain(), EventKind::Degraded, "from the callback");
        let (initiation, work) = inner.begin(spec(), How::Silent).unwrap();
        initiation.begun();
        work.complete(Outcome::done("second"));
        inner_said.send(format!("callback: {}, {} jobs", outcome.message(), inner.jobs().len())).unwrap();
    });
    let (initiation, work) = operations.begin(spec(), how).unwrap();
    work.complete(Outcome::done("early"));
    initiation.begun();
    said.send("initiator".into()).unwrap();
    assert_eq!(heard.recv().await.unwrap(), "initiator");
    assert_eq!(heard.recv().await.unwrap(), "callback: early, 2 jobs");
}

#[tokio::test]
async fn a_failed_initiation_leaves_nothing_behind() {
    let (operations, log) = operations();
    let (how, waiter) = How::wait();
    let (initiation, work) = operations.begin(spec(), how).unwrap();
    let id = initiation.id();
    drop(initiation);
    assert!(work.is_aborted(), "the work is told");
    work.complete(Outcome::done("too late"));
    assert!(matches!(waiter.outcome().await, Outcome::Failed(_)));
    assert_eq!(operations.ended(id).await.unwrap_err().code, ErrorCode::NotFound);
    assert!(operations.jobs().is_empty() && kinds(&log).is_empty());
}

#[tokio::test]
async fn a_panic_of_the_work_is_a_failed_operation() {
    let (operations, log) = operations();
    let (how, waiter) = How::wait();
    let (initiation, work) = operations.begin(spec(), how).unwrap();
    initiation.begun();
    let task = tokio::spawn(async move {
        let _work = work;
        panic!("a bug in an operation");
    });
    assert!(task.await.is_err());
    assert!(waiter.outcome().await.message().contains("bug"));
    assert_eq!(kinds(&log), [EventKind::JobFailed]);
}

#[tokio::test]
async fn an_abort_says_whether_it_is_safe() {
    let (operations, log) = operations();
    let (initiation, work) = operations.begin(spec(), How::Silent).unwrap();
    let id = initiation.begun();
    assert_eq!(operations.abort(id).unwrap(), AbortAnswer::Asked);
    assert_eq!(operations.abort(id).unwrap(), AbortAnswer::Asked, "twice is once");
    work.aborted().await;
    assert!(!work.point_of_no_return("copying"), "the abort was faster");
    work.complete(Outcome::Cancelled("given up".into()));
    assert_eq!(operations.abort(id).unwrap(), AbortAnswer::Ended(Outcome::Cancelled("given up".into())));
    assert_eq!(kinds(&log), [EventKind::JobCancelled]);

    let (initiation, work) = operations.begin(spec(), How::Silent).unwrap();
    let id = initiation.begun();
    assert!(work.point_of_no_return("the copy is being started"));
    assert_eq!(operations.abort(id).unwrap(), AbortAnswer::Refused("the copy is being started".into()));
    assert!(!work.is_aborted() && !operations.jobs()[1].abortable);

    let (initiation, _work) = operations.begin(spec().never_abort("never"), How::Silent).unwrap();
    assert_eq!(operations.abort(initiation.begun()).unwrap(), AbortAnswer::Refused("never".into()));
    assert_eq!(operations.abort(OperationId(99)).unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test(start_paused = true)]
async fn the_daemons_end_completes_everything() {
    let (operations, log) = operations();
    let begin = |spec: Spec| {
        let (how, waiter) = How::wait();
        let (initiation, work) = operations.begin(spec, how).unwrap();
        initiation.begun();
        (work, waiter)
    };
    let (abortable, one) = begin(spec());
    let (slow, two) = begin(spec().never_abort("it cannot"));
    let (_hangs, three) = begin(spec().never_abort("it cannot"));
    tokio::spawn(async move {
        abortable.aborted().await;
        abortable.complete(Outcome::Cancelled("the daemon ends".into()));
    });
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(5)).await;
        slow.complete(Outcome::done("made it"));
    });
    operations.close();
    assert_eq!(operations.begin(spec(), How::Silent).unwrap_err().code, ErrorCode::Conflict);
    operations.finish(Duration::from_secs(10), "remusd has ended").await;
    assert_eq!(one.outcome().await, Outcome::Cancelled("the daemon ends".into()));
    assert_eq!(two.outcome().await, Outcome::done("made it"));
    assert_eq!(three.outcome().await.message(), "remusd has ended");
    assert_eq!(kinds(&log).len(), 3);
}
