//! Slow operations on disks (first synchronisation, resynchronisation, verify) as jobs, and what it means to abort one.
//!
//! Without input and output. The rules, for which "Support sync/async virDomainBlockJobAbort" (libvirt, 2012) is the
//! model and the warning:
//!
//! - A job ends once: completed, cancelled, or failed. A job that completes while an abort is on its way has completed.
//! - An abort that waits is answered when the job has really ended. One that does not is answered at once, and an event
//!   follows, exactly once however many asked.
//! - A cancelled job makes an event only if somebody was told to expect one: an abort that did not wait, or one that has
//!   stopped waiting. A job that completes or fails always makes one.
//! - Jobs do not hinder each other.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::core::throttle::Millis;

/// Names a job, for as long as the daemon lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobId(pub u64);

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names somebody who waits. The caller's choice.
pub type Waiter = u64;

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// The first synchronisation of a pair.
    FirstSync,
    /// Synchronisation of what differs.
    Resync,
    /// Comparing both copies.
    Verify,
}

/// How a job has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It did all it was to do.
    Completed,
    /// It was aborted.
    Cancelled,
    /// It could not go on.
    Failed(String),
}

/// `abort`'s flags, as in the API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AbortFlags {
    /// Do not wait: an event follows.
    pub asynchronous: bool,
}

/// Bits that no flag has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown abort flags {0:#x}; 0x1 (async) is the only one")]
pub struct UnknownFlags(pub u32);

impl AbortFlags {
    /// Bit 0: do not wait.
    pub const ASYNC: u32 = 1 << 0;

    /// From the API's bits.
    ///
    /// # Errors
    /// For any bit that is not a flag: what somebody asks for is not ignored.
    pub fn from_bits(bits: u32) -> Result<Self, UnknownFlags> {
        let unknown = bits & !Self::ASYNC;
        if unknown == 0 { Ok(Self { asynchronous: bits & Self::ASYNC != 0 }) } else { Err(UnknownFlags(unknown)) }
    }
}

/// What the caller has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobAction {
    /// Make the job end. It is told once; the job says by [`Jobs::ended`] when it has.
    Cancel(JobId),
    /// Answer an abort that waited: this is how the job has ended.
    Answer(Waiter, JobId, Outcome),
    /// Answer an abort that waited for too long: the job is still ending, an event follows.
    StillEnding(Waiter, JobId),
    /// Tell everybody.
    Event(JobId, Outcome),
}

/// Why an abort was not begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AbortError {
    /// No such job.
    #[error("there is no job {0}")]
    NoSuchJob(JobId),
    /// It has ended before. Its event, if it made one, is out already.
    #[error("job {0} has ended already: {1:?}")]
    Ended(JobId, Outcome),
}

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// The disk's name.
    pub disk: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, as now known.
    pub total: u64,
    /// Bytes per second, smoothed; 0 until known.
    pub rate: u64,
    /// Milliseconds to go at that rate.
    pub remaining: Option<Millis>,
    /// An abort is under way.
    pub ending: bool,
    /// How it has ended, if it has.
    pub outcome: Option<Outcome>,
}

struct Job {
    info: JobInfo,
    measured: Millis,
    /// Aborts that wait, and until when.
    waiters: Vec<(Waiter, Option<Millis>)>,
    /// Somebody expects an event.
    promised: bool,
}

/// Ended jobs that are remembered, so that an abort that comes late learns how it was.
const REMEMBERED: usize = 64;

/// All jobs of a daemon.
#[derive(Default)]
pub struct Jobs {
    next: u64,
    jobs: BTreeMap<JobId, Job>,
    ended: VecDeque<JobId>,
}

impl Jobs {
    /// A job has begun.
    pub fn start(&mut self, now: Millis, kind: JobKind, disk: &str, total: u64) -> JobId {
        self.next += 1;
        let id = JobId(self.next);
        let info = JobInfo {
            id,
            kind,
            disk: disk.to_owned(),
            done: 0,
            total,
            rate: 0,
            remaining: None,
            ending: false,
            outcome: None,
        };
        self.jobs.insert(id, Job { info, measured: now, waiters: Vec::new(), promised: false });
        id
    }

    /// How far it is now, in bytes.
    pub fn progress(&mut self, now: Millis, id: JobId, done: u64, total: u64) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.info.outcome.is_none()) else { return };
        let took = now.saturating_sub(job.measured);
        if let Some(new) = done.saturating_sub(job.info.done).saturating_mul(1000).checked_div(took) {
            job.info.rate = if job.info.rate == 0 { new } else { (job.info.rate * 3 + new) / 4 };
            job.measured = now;
        }
        (job.info.done, job.info.total) = (done, total);
        let left = total.saturating_sub(done);
        job.info.remaining = (job.info.rate > 0).then(|| left.saturating_mul(1000) / job.info.rate);
    }

    /// Somebody wants it to end. `waiter` is answered later by [`JobAction::Answer`], or at the deadline by
    /// [`JobAction::StillEnding`], unless the flags say not to wait: then this call is the answer.
    ///
    /// # Errors
    /// [`AbortError`], the waiter's answer.
    pub fn abort(
        &mut self,
        id: JobId,
        flags: AbortFlags,
        waiter: Waiter,
        deadline: Option<Millis>,
    ) -> Result<Vec<JobAction>, AbortError> {
        let job = self.jobs.get_mut(&id).ok_or(AbortError::NoSuchJob(id))?;
        if let Some(outcome) = &job.info.outcome {
            return Err(AbortError::Ended(id, outcome.clone()));
        }
        if flags.asynchronous {
            job.promised = true;
        } else {
            job.waiters.push((waiter, deadline));
        }
        let first = !std::mem::replace(&mut job.info.ending, true);
        Ok(if first { vec![JobAction::Cancel(id)] } else { Vec::new() })
    }

    /// The job has ended, really. Saying it again does nothing.
    #[must_use]
    pub fn ended(&mut self, id: JobId, outcome: Outcome) -> Vec<JobAction> {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.info.outcome.is_none()) else { return Vec::new() };
        job.info.outcome = Some(outcome.clone());
        job.info.remaining = None;
        if outcome == Outcome::Completed {
            job.info.done = job.info.total;
        }
        let waiters = std::mem::take(&mut job.waiters);
        let mut actions: Vec<_> =
            waiters.into_iter().map(|(waiter, _)| JobAction::Answer(waiter, id, outcome.clone())).collect();
        if job.promised || outcome != Outcome::Cancelled {
            actions.push(JobAction::Event(id, outcome));
        }
        self.ended.push_back(id);
        if self.ended.len() > REMEMBERED
            && let Some(oldest) = self.ended.pop_front()
        {
            self.jobs.remove(&oldest);
        }
        actions
    }

    /// The clock.
    #[must_use]
    pub fn tick(&mut self, now: Millis) -> Vec<JobAction> {
        let mut actions = Vec::new();
        for (id, job) in &mut self.jobs {
            job.waiters.retain(|(waiter, deadline)| {
                let late = deadline.is_some_and(|at| at <= now);
                if late {
                    job.promised = true;
                    actions.push(JobAction::StillEnding(*waiter, *id));
                }
                !late
            });
        }
        actions
    }

    /// When [`Jobs::tick`] has something to do.
    #[must_use]
    pub fn wake_at(&self) -> Option<Millis> {
        self.jobs.values().flat_map(|job| &job.waiters).filter_map(|(_, deadline)| *deadline).min()
    }

    /// All jobs, and the last ones that have ended.
    pub fn list(&self) -> impl Iterator<Item = &JobInfo> {
        self.jobs.values().map(|job| &job.info)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const WAIT: AbortFlags = AbortFlags { asynchronous: false };
    const ASYNC: AbortFlags = AbortFlags { asynchronous: true };

    #[test]
    fn a_waiting_abort_is_answered_at_the_end_and_makes_no_event() {
        let mut jobs = Jobs::default();
        let id = jobs.start(0, JobKind::Verify, "root", 100);
        assert_eq!(jobs.abort(id, WAIT, 1, None), Ok(vec![JobAction::Cancel(id)]));
        assert_eq!(jobs.ended(id, Outcome::Cancelled), [JobAction::Answer(1, id, Outcome::Cancelled)]);
        assert_eq!(jobs.abort(id, WAIT, 2, None), Err(AbortError::Ended(id, Outcome::Cancelled)));
    }

    #[test]
    fn an_abort_that_does_not_wait_makes_one_event() {
        let mut jobs = Jobs::default();
        let id = jobs.start(0, JobKind::Verify, "root", 100);
        assert_eq!(jobs.abort(id, ASYNC, 1, None), Ok(vec![JobAction::Cancel(id)]));
        assert_eq!(jobs.abort(id, ASYNC, 2, None), Ok(vec![]));
        assert_eq!(jobs.ended(id, Outcome::Cancelled), [JobAction::Event(id, Outcome::Cancelled)]);
        assert_eq!(jobs.ended(id, Outcome::Cancelled), []);
    }

    #[test]
    fn completion_on_the_way_is_completion() {
        let mut jobs = Jobs::default();
        let id = jobs.start(0, JobKind::FirstSync, "root", 100);
        jobs.abort(id, ASYNC, 1, None).unwrap();
        jobs.abort(id, WAIT, 2, None).unwrap();
        let done = Outcome::Completed;
        assert_eq!(jobs.ended(id, done.clone()), [JobAction::Answer(2, id, done.clone()), JobAction::Event(id, done)]);
        assert_eq!(jobs.ended(id, Outcome::Cancelled), [], "only one of the two");
    }

    #[test]
    fn whoever_stops_waiting_is_told_by_event() {
        let mut jobs = Jobs::default();
        let id = jobs.start(0, JobKind::Resync, "root", 100);
        jobs.abort(id, WAIT, 1, Some(500)).unwrap();
        assert_eq!(jobs.wake_at(), Some(500));
        assert_eq!(jobs.tick(499), []);
        assert_eq!(jobs.tick(500), [JobAction::StillEnding(1, id)]);
        assert_eq!(jobs.ended(id, Outcome::Cancelled), [JobAction::Event(id, Outcome::Cancelled)]);
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert_eq!(AbortFlags::from_bits(0), Ok(WAIT));
        assert_eq!(AbortFlags::from_bits(1), Ok(ASYNC));
        assert_eq!(AbortFlags::from_bits(0x8000_0003), Err(UnknownFlags(0x8000_0002)));
    }

    #[test]
    fn progress_has_a_rate_and_a_remaining_time() {
        let mut jobs = Jobs::default();
        let id = jobs.start(1000, JobKind::FirstSync, "root", 4000);
        jobs.progress(2000, id, 1000, 4000);
        let info = jobs.list().next().unwrap();
        assert_eq!((info.rate, info.remaining), (1000, Some(3000)));
    }

    proptest! {
        /// Whatever happens in whatever order: each waiter is answered once, each job makes at most one event, and the
        /// event there must be is there.
        #[test]
        fn everybody_is_told_exactly_once(
            steps in prop::collection::vec((0u8..6, 0u64..4, any::<bool>(), 0u64..50), 1..120),
        ) {
            let mut jobs = Jobs::default();
            let mut now = 0;
            let ids: Vec<_> = (0..4).map(|n| jobs.start(0, JobKind::Verify, &n.to_string(), 10)).collect();
            let (mut asked, mut answered, mut next) = (BTreeSet::new(), BTreeMap::<u64, u32>::new(), 0);
            let (mut events, mut promised, mut outcomes) = (BTreeMap::<JobId, u32>::new(), BTreeSet::new(), BTreeMap::new());
            let mut cancels = BTreeMap::<JobId, u32>::new();
            for step in steps.into_iter().map(Some).chain([None; 4]) {
                let actions = match step {
                    Some((0..=2, job, asynchronous, wait)) => {
                        next += 1;
                        let deadline = (wait % 2 == 0).then_some(now + wait);
                        match jobs.abort(ids[job as usize], AbortFlags { asynchronous }, next, deadline) {
                            Ok(actions) => {
                                if asynchronous { promised.insert(ids[job as usize]); } else { asked.insert(next); }
                                actions
                            }
                            Err(_) => Vec::new(),
                        }
                    }
                    Some((3, _, _, wait)) => {
                        now += wait;
                        jobs.tick(now)
                    }
                    Some((_, job, completed, _)) => {
                        let outcome = if completed { Outcome::Completed } else { Outcome::Cancelled };
                        outcomes.entry(ids[job as usize]).or_insert(outcome.clone());
                        jobs.ended(ids[job as usize], outcome)
                    }
                    None => {
                        let id = *ids.iter().find(|id| !outcomes.contains_key(id)).unwrap_or(&ids[0]);
                        outcomes.entry(id).or_insert(Outcome::Cancelled);
                        jobs.ended(id, Outcome::Cancelled)
                    }
                };
                for action in actions {
                    match action {
                        JobAction::Cancel(id) => *cancels.entry(id).or_default() += 1,
                        JobAction::Answer(waiter, id, outcome) => {
                            prop_assert_eq!(&outcome, &outcomes[&id]);
                            *answered.entry(waiter).or_default() += 1;
                        }
                        JobAction::StillEnding(waiter, id) => {
                            promised.insert(id);
                            *answered.entry(waiter).or_default() += 1;
                        }
                        JobAction::Event(id, outcome) => {
                            prop_assert_eq!(&outcome, &outcomes[&id]);
                            *events.entry(id).or_default() += 1;
                        }
                    }
                }
            }
            prop_assert_eq!(answered.keys().copied().collect::<BTreeSet<_>>(), asked);
            prop_assert!(answered.values().all(|n| *n == 1) && cancels.values().all(|n| *n == 1));
            for id in ids {
                let wanted = outcomes[&id] == Outcome::Completed || promised.contains(&id);
                prop_assert_eq!(events.get(&id).copied().unwrap_or(0), u32::from(wanted));
            }
        }
    }
}
