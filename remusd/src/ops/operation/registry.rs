//! All operations of the daemon.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::cell::{Cell, Initiation, Work};
use super::machine::{Effect, Input};
use super::{How, Job, OperationId, Outcome, Spec};
use crate::ops::{ErrorCode, EventLog, Failure};

/// Ended jobs kept for `remus jobs`.
const ENDED_KEPT: usize = 64;

/// How long callbacks may take at the daemon's end.
const CALLBACKS: Duration = Duration::from_secs(1);

/// What became of the wish to abort.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AbortAnswer {
    /// Asked for: the operation's completion follows, as cancelled or as what it became if that was faster.
    Asked,
    /// It had ended already, so.
    Ended(Outcome),
    /// It is not safe (any more), because.
    Refused(String),
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) log: Arc<EventLog>,
    table: Mutex<Table>,
    /// How many are not over.
    live: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    closing: bool,
    live: BTreeMap<OperationId, Arc<Cell>>,
    ended: VecDeque<(Job, Option<Outcome>)>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, cell: &Cell) {
        let outcome = cell.ended.borrow().clone();
        let job = cell.job();
        let mut table = self.table();
        table.live.remove(&cell.id);
        // One whose initiation has failed was never there.
        if outcome.is_some() {
            table.ended.push_back((job, outcome));
            if table.ended.len() > ENDED_KEPT {
                table.ended.pop_front();
            }
        }
        let left = table.live.len();
        drop(table);
        self.live.send_replace(left);
    }
}

/// All operations of the daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Operations {
    shared: Arc<Shared>,
}

impl Operations {
    /// None yet. `job_*` and `operation_complete` events go to `log`.
    #[must_use]
    pub fn new(log: Arc<EventLog>) -> Self {
        let (table, live) = (Mutex::default(), watch::Sender::new(0));
        Self { shared: Arc::new(Shared { log, table, live }) }
    }

    /// Opens an operation; the initiating call decides with the [`Initiation`] whether it comes to be.
    ///
    /// # Errors
    /// `Conflict` when the daemon is shutting down.
    pub fn begin(&self, spec: Spec, how: How) -> Result<(Initiation, Work), Failure> {
        let mut table = self.shared.table();
        if table.closing {
            drop(table);
            return Err(Failure::new(
                ErrorCode::Conflict,
                "remusd is shutting down and begins nothing new; try again when it runs",
            ));
        }
        table.next += 1;
        let started_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let id = OperationId(table.next);
        let cell = Arc::new(Cell::new(id, spec, how, started_ms, Arc::downgrade(&self.shared)));
        table.live.insert(cell.id, cell.clone());
        let live = table.live.len();
        drop(table);
        self.shared.live.send_replace(live);
        Ok((Initiation { cell: cell.clone(), decided: false }, Work { cell, completed: false }))
    }

    /// Every job that is under way and the latest that have ended, oldest first.
    #[must_use]
    pub fn jobs(&self) -> Vec<Job> {
        let table = self.shared.table();
        let live: Vec<_> = table.live.values().cloned().collect();
        let mut jobs: Vec<_> = table.ended.iter().map(|(job, _)| job.clone()).collect();
        drop(table);
        jobs.extend(live.iter().map(|cell| cell.job()));
        jobs.sort_by_key(|job| job.id);
        // One may have ended between the two looks.
        jobs.dedup_by_key(|job| job.id);
        jobs
    }

    /// Asks an operation to give up. Does not wait; see [`Self::ended`].
    ///
    /// # Errors
    /// `NotFound` when there is none, or it ended long ago.
    pub fn abort(&self, id: OperationId) -> Result<AbortAnswer, Failure> {
        let Some(cell) = self.live(id) else {
            return self.past(id).map(AbortAnswer::Ended);
        };
        let answers = cell.input(Input::Abort, None);
        if answers.contains(&Effect::AbortAsked) {
            return Ok(AbortAnswer::Asked);
        }
        if answers.contains(&Effect::AbortRefused) {
            return Ok(AbortAnswer::Refused(cell.committed().unwrap_or("it is too far").into()));
        }
        cell.outcome().map(AbortAnswer::Ended).ok_or_else(|| not_found(id))
    }

    /// Waits for an operation's end.
    ///
    /// # Errors
    /// `NotFound` when there is none, or it ended long ago.
    pub async fn ended(&self, id: OperationId) -> Result<Outcome, Failure> {
        let Some(cell) = self.live(id) else { return self.past(id) };
        let mut ended = cell.ended.subscribe();
        // Only an initiation that fails leaves it without an outcome.
        drop(cell);
        match ended.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(outcome)) => Ok(outcome),
            _ => Err(not_found(id)),
        }
    }

    fn live(&self, id: OperationId) -> Option<Arc<Cell>> {
        self.shared.table().live.get(&id).cloned()
    }

    fn past(&self, id: OperationId) -> Result<Outcome, Failure> {
        let table = self.shared.table();
        let found = table.ended.iter().find(|(job, _)| job.id == id).and_then(|(_, outcome)| outcome.clone());
        found.ok_or_else(|| not_found(id))
    }

    /// Whether the daemon's end has begun: what is aborted now, nobody has asked to give up.
    #[must_use]
    pub fn closing(&self) -> bool {
        self.shared.table().closing
    }

    /// Begins the daemon's end: no operation can be begun any more, and those that can be aborted are.
    pub fn close(&self) {
        let live: Vec<_> = {
            let mut table = self.shared.table();
            table.closing = true;
            table.live.values().cloned().collect()
        };
        for cell in live {
            cell.input(Input::Abort, None);
        }
    }

    /// Waits until every operation is over; what is not after `patience` is completed as failed, with `why`. [`Self::close`] comes first.
    pub async fn finish(&self, patience: Duration, why: &str) {
        let mut live = self.shared.live.subscribe();
        if tokio::time::timeout(patience, live.wait_for(|count| *count == 0)).await.is_ok() {
            return;
        }
        let left: Vec<_> = self.shared.table().live.values().cloned().collect();
        for cell in left {
            let outcome = Outcome::Failed(Failure::new(ErrorCode::Failed, why));
            cell.input(Input::GivenUp, Some(outcome));
        }
        // Only callbacks are left.
        let _ = tokio::time::timeout(CALLBACKS, live.wait_for(|count| *count == 0)).await;
    }
}

fn not_found(id: OperationId) -> Failure {
    Failure::new(ErrorCode::NotFound, format!("There is no job {id}; `remus jobs` lists those of this run of remusd"))
}
