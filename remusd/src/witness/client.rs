//! The witness client as a machine without input and output: one per protection and side, the same in the daemon and in the simulator.
//!
//! It reads, decides by [`super::rules`], swaps, and after an unknown outcome reads again until it knows. The driver carries the
//! effects out in order, and does nothing after a [`Effect::SaveWatermark`] before that is durable.

use super::record::{Attempt, Host, Position, Record, Versioned, Watermark};
use super::rules::{self, Intent, Refusal, Step};
use crate::ids::ProtectionId;

/// Names one request, so that the answer to a forgotten one is told from the one awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Read the record, linearizably; answer with [`Input::Read`].
    Read(RequestId),
    /// Replace exactly `expected` by `new`; answer with [`Input::Cas`].
    Cas {
        /// Of this request.
        request: RequestId,
        /// What must still be there: the same record (or none) at the same `modified` revision.
        expected: Box<Versioned>,
        /// What is to be there.
        new: Box<Record>,
    },
    /// Nothing is known yet. Wait a while (backoff), then give [`Input::Retry`].
    Wait {
        /// Of this request.
        request: RequestId,
        /// What is in the way, for people.
        why: String,
    },
    /// Make this durable before going on.
    SaveWatermark(Watermark),
    /// The intent is settled.
    Done(Outcome),
    /// Something is wrong with the witness that a person has to know.
    Alarm(String),
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Answer to [`Effect::Read`].
    Read(RequestId, Result<Versioned, ReadError>),
    /// Answer to [`Effect::Cas`].
    Cas(RequestId, CasReply),
    /// The wait is over.
    Retry(RequestId),
}

/// A read that gave no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No answer; another try may have one.
    #[error("the witness does not answer: {0}")]
    Unavailable(String),
    /// There is a value, and it is not a record that this version understands.
    #[error("{0}")]
    Unreadable(String),
}

/// What is known of a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasReply {
    /// It was done.
    Applied(Position),
    /// It was not and never will be: something else was there.
    Conflict,
    /// Neither is known: no answer, a timeout, an error. It may still be applied later.
    Unknown(String),
}

/// How an intent ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As wanted; the record as it was then.
    Won(Box<Record>),
    /// Another host has it. Seal, freeze, watch the record.
    Lost(Box<Record>),
    /// Not done, and nobody is known to have it. Hold.
    Refused(Refusal),
    /// [`Intent::Look`]: the record.
    Seen(Box<Record>),
}

/// An intent is under way already.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the witness is being asked already (to {0})")]
pub struct Busy(pub &'static str);

/// An intent that was given up unsettled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// What it was.
    pub intent: Intent,
    /// Whether a change was sent, which may be applied even now. Later intents are safe from it (they read first, and a swap expects
    /// exactly what was read), but a claim that was sent has burnt its generation.
    pub sent: bool,
}

#[derive(Clone, Debug)]
enum Stage {
    Reading,
    Swapping { expected: Box<Versioned>, new: Box<Record> },
    Waiting,
}

#[derive(Clone, Debug)]
struct Run {
    intent: Intent,
    attempt: Attempt,
    stage: Stage,
    request: RequestId,
    /// What this host remembered when the read was sent; what others learn meanwhile must not make a slow answer look old.
    floor: Watermark,
    /// The swap that was sent last, since the last wait: the same one is not sent again without a wait.
    tried: Option<Box<Versioned>>,
    sent: bool,
    /// What is remembered of the store does not count: a person's word, or the primary's with the very record as proof, outweighs it.
    anew: bool,
    /// The record that a forced claim began from.
    forced_from: Option<Option<Record>>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Client {
    me: Host,
    uuid: ProtectionId,
    watermark: Watermark,
    saved: Watermark,
    next: u64,
    run: Option<Run>,
}

impl Client {
    /// For host `me`, which remembers `watermark` (the durable one; empty if there is none).
    #[must_use]
    pub fn new(me: Host, uuid: ProtectionId, watermark: Watermark) -> Self {
        Self { me, uuid, saved: watermark.clone(), watermark, next: 0, run: None }
    }

    /// This host.
    #[must_use]
    pub fn me(&self) -> &Host {
        &self.me
    }

    /// What is remembered now.
    #[must_use]
    pub fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    /// What is under way, and whether a change has been sent for it.
    #[must_use]
    pub fn pending(&self) -> Option<(&Intent, bool)> {
        self.run.as_ref().map(|r| (&r.intent, r.sent))
    }

    /// Begins. `attempt` is fresh and random, never used before.
    ///
    /// # Errors
    /// [`Busy`] unless the last intent is settled or [`Self::cancel`]led.
    pub fn start(&mut self, intent: Intent, attempt: Attempt) -> Result<Vec<Effect>, Busy> {
        if let Some(run) = &self.run {
            return Err(Busy(run.intent.name()));
        }
        let request = self.request();
        let floor = self.watermark.clone();
        self.run = Some(Run {
            anew: matches!(intent, Intent::Force { .. }),
            intent,
            attempt,
            stage: Stage::Reading,
            request,
            floor,
            tried: None,
            sent: false,
            forced_from: None,
        });
        Ok(vec![Effect::Read(request)])
    }

    /// Gives an unsettled intent up.
    pub fn cancel(&mut self) -> Option<Dropped> {
        self.run.take().map(|r| Dropped { intent: r.intent, sent: r.sent })
    }

    /// A probe saw the store at this position: what is older is old news from now on. Ignored of another store.
    pub fn observed(&mut self, position: &Position) {
        if let Some(p) = &mut self.watermark.position
            && p.store == position.store
        {
            p.revision = p.revision.max(position.revision);
        }
    }

    /// Takes an answer. One that is not awaited is ignored.
    pub fn on(&mut self, input: Input) -> Vec<Effect> {
        let request = match &input {
            Input::Read(r, _) | Input::Cas(r, _) | Input::Retry(r) => *r,
        };
        let Some(mut run) = self.run.take_if(|r| r.request == request) else { return vec![] };
        match (input, std::mem::replace(&mut run.stage, Stage::Waiting)) {
            (Input::Read(_, Ok(found)), Stage::Reading) => self.found(run, found),
            (Input::Read(_, Err(ReadError::Unreadable(text))), Stage::Reading) => {
                self.refuse(&run, Refusal::Unreadable(text))
            }
            (Input::Read(_, Err(e @ ReadError::Unavailable(_))), Stage::Reading) => self.wait(run, e.to_string()),
            (Input::Cas(_, reply), Stage::Swapping { expected, new }) => match reply {
                CasReply::Applied(position) => match rules::check_store(&expected.position, &position) {
                    Ok(()) => self.settle(&run, Outcome::Won(new), &position),
                    Err(refusal) => self.refuse(&run, refusal),
                },
                CasReply::Conflict | CasReply::Unknown(_) => self.read(run),
            },
            (Input::Retry(_), Stage::Waiting) => {
                run.tried = None;
                self.read(run)
            }
            (_, stage) => {
                self.run = Some(Run { stage, ..run });
                vec![]
            }
        }
    }

    fn found(&mut self, mut run: Run, found: Versioned) -> Vec<Effect> {
        let record = found.record.as_ref();
        if let Intent::Accept(key) = &run.intent {
            run.anew = key.generation > run.floor.generation() && record.is_some_and(|r| r.key() == *key);
        }
        if !run.anew
            && let Err(refusal) = rules::check_history(&run.floor, &found)
        {
            return self.refuse(&run, refusal);
        }
        if let Some(r) = record
            && r.attempt == run.attempt
        {
            return self.settle(&run, Outcome::Won(Box::new(r.clone())), &found.position);
        }
        if matches!(run.intent, Intent::Force { .. }) {
            match &run.forced_from {
                None => run.forced_from = Some(record.cloned()),
                // The host that is said to be off has just changed the record.
                Some(from) if from.as_ref() != record && record.is_some_and(|r| !r.owner.is(&self.me)) => {
                    let record = Box::new(record.expect("looked at above").clone());
                    let mut effects = vec![Effect::Alarm(format!(
                        "forcing the claim was stopped: the other host is not off, it has just changed the record ({record})"
                    ))];
                    effects.extend(self.settle(&run, Outcome::Lost(record), &found.position));
                    return effects;
                }
                Some(_) => {}
            }
        }
        match rules::step(&self.me, self.uuid, &run.intent, run.attempt, record, &self.watermark) {
            Step::Won(r) => self.settle(&run, Outcome::Won(r), &found.position),
            Step::Lost(r) => self.settle(&run, Outcome::Lost(r), &found.position),
            Step::Seen(r) => self.settle(&run, Outcome::Seen(r), &found.position),
            Step::Refuse(refusal) => {
                self.watermark.raise(record, &found.position);
                self.refuse(&run, refusal)
            }
            Step::Swap(_) if run.tried.as_ref().is_some_and(|t| same(t, &found)) => {
                self.wait(run, "the witness did not apply the change".into())
            }
            Step::Swap(new) => {
                let request = self.request();
                let expected = Box::new(found);
                run.tried = Some(expected.clone());
                run.sent = true;
                run.request = request;
                run.stage = Stage::Swapping { expected: expected.clone(), new: new.clone() };
                self.run = Some(run);
                vec![Effect::Cas { request, expected, new }]
            }
        }
    }

    fn read(&mut self, mut run: Run) -> Vec<Effect> {
        run.request = self.request();
        run.stage = Stage::Reading;
        run.floor = self.watermark.clone();
        let request = run.request;
        self.run = Some(run);
        vec![Effect::Read(request)]
    }

    fn wait(&mut self, mut run: Run, why: String) -> Vec<Effect> {
        run.request = self.request();
        run.stage = Stage::Waiting;
        let request = run.request;
        self.run = Some(run);
        vec![Effect::Wait { request, why }]
    }

    fn settle(&mut self, run: &Run, outcome: Outcome, position: &Position) -> Vec<Effect> {
        if let Outcome::Won(r) | Outcome::Lost(r) | Outcome::Seen(r) = &outcome {
            if run.anew {
                self.watermark.position = None;
            }
            self.watermark.raise(Some(r), position);
        }
        self.done(outcome)
    }

    fn refuse(&mut self, run: &Run, refusal: Refusal) -> Vec<Effect> {
        // Looking whether there is a record is no reason for alarm, nor is asking for what the record's state does not allow.
        let never_seen = self.watermark.key.is_none() && matches!(run.intent, Intent::Look);
        let mut effects = match &refusal {
            Refusal::WrongState(_) => vec![],
            Refusal::Absent if never_seen => vec![],
            refusal => vec![Effect::Alarm(refusal.to_string())],
        };
        effects.extend(self.done(Outcome::Refused(refusal)));
        effects
    }

    fn done(&mut self, outcome: Outcome) -> Vec<Effect> {
        let mut effects = vec![];
        if self.watermark != self.saved {
            self.saved = self.watermark.clone();
            effects.push(Effect::SaveWatermark(self.watermark.clone()));
        }
        effects.push(Effect::Done(outcome));
        effects
    }

    fn request(&mut self) -> RequestId {
        self.next += 1;
        RequestId(self.next)
    }
}

/// Whether nothing has been written in between (the store's own revision moves with other records too).
fn same(a: &Versioned, b: &Versioned) -> bool {
    a.record == b.record && a.position.store == b.position.store && a.position.modified == b.position.modified
}
