//! All devices of one protection, driven together.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream::{FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};

use crate::device::{Device, DeviceStats, Ending, EpochContext};
use crate::error::{DeviceError, SetError};
use crate::policy::{Allow, Policy};
use crate::subkind::{Checkpointed, Match, Subkind};

#[cfg(test)]
mod tests;

/// All devices of one protection. Made once per protection, set up once, torn down at least once.
///
/// Dropping a set without `teardown` leaves the devices as they are (`Ending::Hold`).
pub struct DeviceSet {
    subkinds: Vec<Arc<dyn Subkind>>,
    policy: Policy,
    state: State,
    /// How many of `subkinds`, from the first, are initialised and not cleaned up.
    initialised: usize,
    /// Every device whose subkind matched and which is not torn down, whether or not its set-up succeeded.
    taken: Vec<Taken>,
    passed: Vec<Passed>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Ready,
    Failed,
    Down,
}

struct Taken {
    device: Device,
    subkind: &'static str,
    ops: Box<dyn Checkpointed>,
}

/// A device that no subkind takes and policy lets pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passed {
    /// The device.
    pub device: Device,
    /// The rule that lets it pass.
    pub rule: Allow,
}

/// What a recovery needs about one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The device.
    pub device: Device,
    /// The name of the subkind that has it.
    pub subkind: String,
    /// The subkind's own data, from [`Checkpointed::record`].
    pub data: serde_json::Value,
}

/// The rounds that run over all devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Arm,
    Postsuspend,
    Preresume,
    Confirm,
    Commit,
    Abandon,
}

impl Phase {
    fn doing(self) -> &'static str {
        match self {
            Phase::Arm => "be armed",
            Phase::Postsuspend => "close an epoch",
            Phase::Preresume => "prepare to resume",
            Phase::Confirm => "wait for an epoch's replication",
            Phase::Commit => "commit an epoch",
            Phase::Abandon => "abandon an epoch",
        }
    }
}

/// What became of one device during set-up.
enum Outcome {
    /// Matched; with the error of its own set-up, if that failed.
    Taken(Taken, Option<DeviceError>),
    Passed(Passed),
    Error(DeviceError),
    /// Not looked at, or not to the end, because another device had failed.
    Stopped,
}

impl DeviceSet {
    /// A set that asks `subkinds` in this order. Nothing is touched before [`DeviceSet::setup`].
    #[must_use]
    pub fn new(subkinds: Vec<Arc<dyn Subkind>>, policy: Policy) -> Self {
        Self { subkinds, policy, state: State::New, initialised: 0, taken: Vec::new(), passed: Vec::new() }
    }

    /// Initialises the subkinds, finds one for each device and sets all devices up, concurrently.
    ///
    /// # Errors
    /// The first failure. It stops new work: no device is matched or set up any more, those being set up are
    /// waited for, everything that matched is torn down, and the subkinds are cleaned up. The set cannot be
    /// used again. A second call is refused.
    pub async fn setup(&mut self, devices: Vec<Device>) -> Result<(), SetError> {
        if self.state != State::New {
            return Err(self.refuse("be set up"));
        }
        self.state = State::Failed;
        let mut errors = Vec::new();
        for subkind in &self.subkinds {
            if let Err(e) = subkind.init() {
                errors.push(e);
                break;
            }
            self.initialised += 1;
        }
        if errors.is_empty() {
            errors = self.take_all(devices).await;
        }
        let Some(mut error) = SetError::from_errors(errors) else {
            self.state = State::Ready;
            return Ok(());
        };
        // Nothing was armed: whatever is there holds no output, and this host runs the guest.
        error.teardown = self.teardown_taken(Ending::Release).await;
        Err(error)
    }

    async fn take_all(&mut self, devices: Vec<Device>) -> Vec<DeviceError> {
        let stop = AtomicBool::new(false);
        let mut running: FuturesUnordered<_> =
            devices.into_iter().map(|device| take(&self.subkinds, &self.policy, device, &stop)).collect();
        let mut errors = Vec::new();
        while let Some(outcome) = running.next().await {
            match outcome {
                Outcome::Taken(taken, error) => {
                    self.taken.push(taken);
                    errors.extend(error);
                }
                Outcome::Passed(passed) => self.passed.push(passed),
                Outcome::Error(error) => errors.push(error),
                Outcome::Stopped => {}
            }
        }
        drop(running);
        self.taken.sort_by_key(|t| (t.device.kind, t.device.devid));
        errors
    }

    /// Whether every device could be armed now. Before that epochs are taken all the same, unarmed.
    pub async fn is_ready(&mut self) -> bool {
        let asked: FuturesUnordered<_> = self.taken.iter_mut().map(|t| t.ops.is_ready()).collect();
        asked.all(|ready| async move { ready }).await
    }

    /// From here on output is held. Call just before the first armed epoch's suspend.
    ///
    /// # Errors
    /// The first device's error, with those of all others, once all are done.
    pub async fn arm(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Arm, epoch).await
    }

    /// The guest is suspended.
    ///
    /// # Errors
    /// As for [`DeviceSet::arm`]. The epoch must then be abandoned, also by [`DeviceSet::abandon`].
    pub async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Postsuspend, epoch).await
    }

    /// The guest is about to run again.
    ///
    /// # Errors
    /// As for [`DeviceSet::postsuspend`].
    pub async fn preresume(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Preresume, epoch).await
    }

    /// The guest runs, and the epoch is about to be declared whole. Waits for devices that replicate by themselves.
    ///
    /// # Errors
    /// As for [`DeviceSet::arm`]. The epoch must not be declared whole.
    pub async fn confirm(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Confirm, epoch).await
    }

    /// The epoch is acknowledged.
    ///
    /// # Errors
    /// As for [`DeviceSet::arm`]. What the failed devices hold stays held, and they refuse the next epoch.
    pub async fn commit(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Commit, epoch).await
    }

    /// The epoch was closed (or its closing failed on some device) and will never be acknowledged.
    ///
    /// # Errors
    /// As for [`DeviceSet::commit`].
    pub async fn abandon(&mut self, epoch: &EpochContext) -> Result<(), SetError> {
        self.run(Phase::Abandon, epoch).await
    }

    async fn run(&mut self, phase: Phase, epoch: &EpochContext) -> Result<(), SetError> {
        if self.state != State::Ready {
            return Err(self.refuse(phase.doing()));
        }
        type Step<'a> = Pin<Box<dyn Future<Output = Result<(), DeviceError>> + Send + 'a>>;
        let mut running: FuturesUnordered<Step<'_>> = self
            .taken
            .iter_mut()
            .map(|t| match phase {
                Phase::Arm => t.ops.arm(),
                Phase::Postsuspend => t.ops.postsuspend(epoch),
                Phase::Preresume => t.ops.preresume(epoch),
                Phase::Confirm => t.ops.confirm(epoch),
                Phase::Commit => t.ops.commit(epoch),
                Phase::Abandon => t.ops.abandon(epoch),
            })
            .collect();
        let mut errors = Vec::new();
        while let Some(result) = running.next().await {
            errors.extend(result.err());
        }
        match SetError::from_errors(errors) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Ends the care of every device, concurrently, and cleans the subkinds up. Also after a failed set-up. May
    /// be called again: only devices whose teardown failed are tried again.
    ///
    /// Returns what could not be undone, in the order it failed.
    pub async fn teardown(&mut self, ending: Ending) -> Vec<DeviceError> {
        self.state = State::Down;
        self.teardown_taken(ending).await
    }

    async fn teardown_taken(&mut self, ending: Ending) -> Vec<DeviceError> {
        let mut running: FuturesUnordered<_> = self
            .taken
            .drain(..)
            .map(|mut taken| async move {
                let result = taken.ops.teardown(ending).await;
                (taken, result)
            })
            .collect();
        let (mut kept, mut errors) = (Vec::new(), Vec::new());
        while let Some((taken, result)) = running.next().await {
            if let Err(error) = result {
                errors.push(error);
                kept.push(taken);
            }
        }
        drop(running);
        self.taken = kept;
        if self.taken.is_empty() {
            self.cleanup();
        }
        errors
    }

    fn cleanup(&mut self) {
        for subkind in self.subkinds[..self.initialised].iter().rev() {
            subkind.cleanup();
        }
        self.initialised = 0;
    }

    fn refuse(&self, doing: &'static str) -> SetError {
        SetError {
            cause: DeviceError::NotReady {
                doing,
                why: match self.state {
                    State::New => "they are not set up",
                    State::Ready => "they are set up already",
                    State::Failed => "their set-up failed",
                    State::Down => "they are torn down",
                },
            },
            others: Vec::new(),
            teardown: Vec::new(),
        }
    }

    /// What each device holds and has lost, as last seen. Does not block.
    #[must_use]
    pub fn stats(&self) -> Vec<(&Device, DeviceStats)> {
        self.taken.iter().map(|t| (&t.device, t.ops.stats())).collect()
    }

    /// What a recovery after a crash of this process needs. Keep it on disk once `setup` has returned.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.taken
            .iter()
            .map(|t| Record { device: t.device.clone(), subkind: t.subkind.to_owned(), data: t.ops.record() })
            .collect()
    }

    /// The devices nobody takes care of, by policy: name them to the operator.
    #[must_use]
    pub fn passed(&self) -> &[Passed] {
        &self.passed
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        self.cleanup();
    }
}

/// Finds the subkind for one device and sets it up, unless `stop` says that another device has failed. The
/// first to fail says so itself, before its future completes, so that no order of polling lets more work start.
async fn take(subkinds: &[Arc<dyn Subkind>], policy: &Policy, device: Device, stop: &AtomicBool) -> Outcome {
    let stopped = || stop.load(Ordering::Relaxed);
    let fail = |error| {
        stop.store(true, Ordering::Relaxed);
        error
    };
    for subkind in subkinds.iter().filter(|s| s.kind() == device.kind) {
        if stopped() {
            return Outcome::Stopped;
        }
        match subkind.matches(&device).await {
            Ok(Match::No) => {}
            Err(error) => return Outcome::Error(fail(error)),
            Ok(Match::Yes) => {
                let mut taken = Taken { ops: subkind.attach(&device), subkind: subkind.name(), device };
                if stopped() {
                    return Outcome::Taken(taken, None);
                }
                let error = taken.ops.setup().await.err().map(fail);
                return Outcome::Taken(taken, error);
            }
        }
    }
    if stopped() {
        return Outcome::Stopped;
    }
    match policy.lets_pass(&device) {
        Some(rule) => Outcome::Passed(Passed { rule: rule.clone(), device }),
        None => Outcome::Error(fail(not_taken(subkinds, &device))),
    }
}

fn not_taken(subkinds: &[Arc<dyn Subkind>], device: &Device) -> DeviceError {
    let asked: Vec<_> = subkinds.iter().filter(|s| s.kind() == device.kind).map(|s| s.name()).collect();
    DeviceError::NotTaken {
        device: device.to_string(),
        tried: match asked.as_slice() {
            [] => format!("no subkind for {} devices is configured", device.kind),
            names => format!("asked: {}", names.join(", ")),
        },
        advice: match (&device.kind, device.names.first()) {
            (crate::Kind::Disk, Some(name)) => {
                format!("detach it from the guest, or accept that it is not replicated: --unsafe disk:{name}")
            }
            _ => "detach it from the guest".into(),
        },
    }
}
