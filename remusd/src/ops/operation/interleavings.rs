//! The completion race, exhaustively: every interleaving of the initiator, the work, an aborter, the daemon's end and the runtime, on the
//! real code. Each party's turn is either one locked step or what it does after the lock is released ([`Cell::step`] and
//! [`Cell::perform`]); nothing finer can be seen by the others, since a step holds the lock and what follows it works on values of
//! its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cell::{Cell, Initiation, Todo, Work};
use super::machine::{Effect, Input};
use super::tests::{operations, spec};
use super::{How, JobState, Outcome, Waiter};
use crate::ops::{ErrorCode, EventKind, Failure, Filter};

/// What a party does, in order. Each input takes two turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Input(Input),
    /// Carries out what the party's last input has left to do.
    Perform,
    /// The runtime runs what is spawned.
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Wait,
    Callback,
    Event,
}

fn party(inputs: &[Input]) -> Vec<Turn> {
    inputs.iter().flat_map(|input| [Turn::Input(*input), Turn::Perform]).collect()
}

/// Calls `each` with every merge of the parties' turns.
fn merges(parties: &[Vec<Turn>], at: &mut Vec<usize>, made: &mut Vec<usize>, each: &mut impl FnMut(&[usize])) {
    let mut done = true;
    for who in 0..parties.len() {
        if at[who] < parties[who].len() {
            done = false;
            at[who] += 1;
            made.push(who);
            merges(parties, at, made, each);
            made.pop();
            at[who] -= 1;
        }
    }
    if done {
        each(made);
    }
}

struct Run {
    cell: Arc<Cell>,
    handles: (Initiation, Work),
    waiter: Option<Waiter>,
    calls: Arc<AtomicUsize>,
}

fn outcome(input: Input) -> Option<Outcome> {
    match input {
        Input::WorkEnded => Some(Outcome::done("work")),
        Input::GivenUp => Some(Outcome::Failed(Failure::new(ErrorCode::Failed, "given up"))),
        _ => None,
    }
}

async fn play(parties: &[Vec<Turn>], order: &[usize], way: Way) {
    let (operations, log) = operations();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let (how, waiter) = match way {
        Way::Wait => {
            let (how, waiter) = How::wait();
            (how, Some(waiter))
        }
        Way::Event => (How::Event { tag: "t".into() }, None),
        Way::Callback => {
            let call = How::callback(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
            });
            (call, None)
        }
    };
    let (mut initiation, mut work) = operations.begin(spec(), how).unwrap();
    let cell = work.cell.clone();
    // The parties act through the cell: the handles must not speak when they are dropped.
    (initiation.decided, work.completed) = (true, true);
    let run = Run { cell, handles: (initiation, work), waiter, calls };

    let mut at = vec![0; parties.len()];
    let mut left: Vec<Option<Todo>> = parties.iter().map(|_| None).collect();
    let mut answers: Vec<(Input, &'static [Effect])> = Vec::new();
    for who in order {
        match parties[*who][at[*who]] {
            Turn::Input(input) => {
                let todo = run.cell.step(input, outcome(input));
                answers.push((input, todo.answers));
                left[*who] = Some(todo);
            }
            Turn::Perform => {
                let before = run.calls.load(Ordering::SeqCst);
                run.cell.perform(left[*who].take().unwrap());
                assert_eq!(run.calls.load(Ordering::SeqCst), before, "called on somebody's stack: {order:?}");
            }
            Turn::Tick => tokio::task::yield_now().await,
        }
        at[*who] += 1;
    }
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }

    let begun = answers.iter().any(|(input, _)| *input == Input::Begun);
    let expected = usize::from(begun);
    let events = log.kept(&Filter::default());
    let ended =
        |event: &EventKind| matches!(event, EventKind::JobCompleted | EventKind::JobCancelled | EventKind::JobFailed);
    assert_eq!(events.iter().filter(|e| ended(&e.kind)).count(), expected, "{order:?} {answers:?}");
    let heard = match way {
        Way::Callback => run.calls.load(Ordering::SeqCst),
        Way::Event => events.iter().filter(|e| e.kind == EventKind::OperationComplete).count(),
        Way::Wait => usize::from(run.waiter.unwrap().outcome().await.message() != NEVER),
    };
    assert_eq!(heard, expected, "exactly once if it was begun, never if not: {order:?} {answers:?}");
    let jobs = operations.jobs();
    assert_eq!(jobs.len(), expected, "over and kept, or forgotten: {order:?}");
    if let Some(job) = jobs.first() {
        // The first end is the one that counts.
        let first = answers.iter().find(|(_, effects)| effects.contains(&Effect::KeepOutcome)).unwrap().0;
        let state = if first == Input::WorkEnded { JobState::Completed } else { JobState::Failed };
        assert_eq!(job.state, state, "{order:?}");
    }
    let asked = answers.iter().any(|(_, effects)| effects.contains(&Effect::AbortAsked));
    let (_, work) = &run.handles;
    assert!(!asked || work.is_aborted(), "who was told that an abort is asked for: the work knows: {order:?}");
}

const NEVER: &str = "the operation was never begun; its initiation has failed";

async fn all(parties: &[Vec<Turn>], way: Way) -> usize {
    let mut orders = Vec::new();
    merges(parties, &mut vec![0; parties.len()], &mut Vec::new(), &mut |order| orders.push(order.to_vec()));
    for order in &orders {
        play(parties, order, way).await;
    }
    orders.len()
}

#[tokio::test]
async fn every_interleaving_completes_exactly_once_or_never() {
    for way in [Way::Wait, Way::Callback, Way::Event] {
        for decision in [Input::Begun, Input::InitiationFailed] {
            let parties = [
                party(&[decision]),
                party(&[Input::PointOfNoReturn, Input::WorkEnded]),
                party(&[Input::Abort]),
                vec![Turn::Tick],
            ];
            // 9! / (2! 4! 2! 1!)
            assert_eq!(all(&parties, way).await, 3780);
            let parties =
                [party(&[decision]), party(&[Input::WorkEnded]), party(&[Input::Abort]), party(&[Input::GivenUp])];
            // 8! / 2!^4
            assert_eq!(all(&parties, way).await, 2520);
        }
    }
}

/// The same race on real threads: what the interleavings cannot show is that the lock is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn real_threads_race_to_one_completion() {
    for _ in 0..300 {
        let (operations, log) = operations();
        let (how, waiter) = How::wait();
        let (initiation, work) = operations.begin(spec(), how).unwrap();
        let id = initiation.id();
        let barrier = Arc::new(tokio::sync::Barrier::new(3));
        let (b1, b2, ops) = (barrier.clone(), barrier.clone(), operations.clone());
        let worker = tokio::spawn(async move {
            b1.wait().await;
            work.complete(Outcome::done("work"));
        });
        let aborter = tokio::spawn(async move {
            b2.wait().await;
            ops.abort(id)
        });
        barrier.wait().await;
        initiation.begun();
        assert_eq!(waiter.outcome().await, Outcome::done("work"));
        worker.await.unwrap();
        aborter.await.unwrap().unwrap();
        assert_eq!(log.kept(&Filter::default()).len(), 1);
    }
}
