//! The words of the primary's state machine: its settings, states, events and actions.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Epoch;

/// What the primary does when it has lost the backup and no witness is configured: the token is the primary's (hazard F19).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum OnBackupLoss {
    /// The guest goes on alone, held output flows.
    #[default]
    Alone,
    /// The guest goes on but its output stays held until an operator decides.
    Hold,
}

/// The settings that the machine decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// See [`OnBackupLoss`].
    pub on_backup_loss: OnBackupLoss,
    /// Arm the next epoch once an unarmed one had at most this many pages.
    pub arm_pages: u64,
    /// Arm after this many unarmed epochs (the first copy counts) even if they stay large. At least 1.
    pub max_unarmed: u64,
    /// How often in a row a guest may fail to suspend before protection ends.
    pub suspend_retries: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { on_backup_loss: OnBackupLoss::Alone, arm_pages: 16 * 1024, max_unarmed: 6, suspend_retries: 3 }
    }
}

/// How a guest ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestEnd {
    /// Shutdown reason 0.
    Poweroff,
    /// Shutdown reason 1.
    Reboot,
    /// Shutdown reason 3.
    Crash,
    /// Shutdown reason 4.
    Watchdog,
    /// The domain does not exist any more: somebody destroyed it.
    Gone,
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Poweroff => "poweroff",
            Self::Reboot => "reboot",
            Self::Crash => "crash",
            Self::Watchdog => "watchdog",
            Self::Gone => "destroyed",
        })
    }
}

/// Why a STOP is sent to the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopWhy {
    /// An operator asked for it.
    Planned,
    /// The guest ended by itself.
    GuestEnded(GuestEnd),
    /// Checkpointing cannot go on; the guest can.
    Failed(String),
}

/// How a protection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was begun that is not undone; the guest runs on as before.
    NotStarted(String),
    /// Stopped as asked; no copy is left at the backup.
    Stopped,
    /// The guest runs on here, unprotected.
    Alone(String),
    /// The guest ended by itself and the end is recorded.
    GuestEnded(GuestEnd),
    /// The other host's copy runs; this one is sealed and destroyed.
    Superseded(String),
}

/// Where the protection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Link and devices are being set up; nothing of the guest is touched.
    Starting,
    /// Epoch 0's live pass: pages are sent while the guest runs.
    FirstCopy,
    /// The guest has been asked to suspend.
    Suspending(Epoch),
    /// The guest did not suspend; it runs, a new try is on the timer. The engine waits.
    Retrying(Epoch),
    /// The guest stands still: devices close the epoch, the engine copies.
    Capturing(Epoch),
    /// The copy is complete: devices prepare, the guest is let go.
    Resuming(Epoch),
    /// The guest runs; the epoch is on its way or waits for its acknowledgement.
    Shipping(Epoch),
    /// The acknowledgement is here; devices release the epoch's output.
    Committing(Epoch),
    /// The interval timer runs.
    Idle(Epoch),
    /// STOP is sent; its confirmation is awaited. Output stays held.
    Stopping(StopWhy),
    /// The backup is lost; it is being decided who owns the guest. Output stays held.
    Arbitrating(StopWhy),
    /// The backup is lost and policy or the witness keeps output held until an operator decides.
    Holding(StopWhy),
    /// Everything is being put back.
    CleaningUp(Outcome),
    /// Over.
    Ended(Outcome),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Link agreed and devices set up.
    Started,
    /// Link or devices could not be set up.
    StartFailed(String),
    /// The engine wants the guest suspended.
    EngineSuspend,
    /// The engine has copied everything and wants the guest resumed.
    EngineCopied,
    /// The engine waits to be told to go on with the next epoch.
    EngineWaiting,
    /// The engine failed or ended.
    EngineFailed(String),
    /// The guest is suspended.
    GuestSuspended,
    /// The guest did not suspend in time; the request is withdrawn and it runs.
    SuspendFailed(String),
    /// All devices have closed the epoch.
    Postsuspended,
    /// All devices are ready for the guest.
    Preresumed,
    /// The guest runs again.
    Resumed,
    /// A device, resume or the deadline of the suspended section failed the epoch; text says which.
    EpochFailed(String),
    /// The backup holds this epoch. `pages` is what the epoch had, for arming.
    Ack {
        /// Which epoch.
        epoch: Epoch,
        /// Pages in it.
        pages: u64,
    },
    /// The backup answers but this epoch's acknowledgement is late (hazard F22).
    AckLate,
    /// Devices have released the epoch.
    Committed,
    /// Interval or retry timer.
    Timer,
    /// The backup cannot be reached or has said that it can hold no copy any more.
    BackupLost(String),
    /// Arbitration: this host owns the guest.
    ClaimWon,
    /// Arbitration: the other host owns the guest.
    ClaimLost(String),
    /// Arbitration: nobody knows; ask again or wait for the operator.
    ClaimUnknown,
    /// The backup's copy has been activated.
    Superseded(String),
    /// An operator wants protection ended.
    StopRequested,
    /// The backup has destroyed its copy.
    Stopped,
    /// No confirmation of STOP came.
    StopLate,
    /// The guest ended by itself.
    GuestEnded(GuestEnd),
    /// Cleaning up is done.
    CleanedUp,
}

/// What becomes of held output and of the gates when devices are put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// We own the guest: held output flows, everything is put back.
    Release,
    /// We do not: held output is dropped, the vifs stay sealed.
    Discard,
}

/// What becomes of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainFate {
    /// It runs on.
    Keep,
    /// What its configuration says for this end.
    ByConfig(GuestEnd),
    /// It is destroyed: another copy is active.
    Destroy,
}

/// What the driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the capture engine.
    StartEngine,
    /// Arm the devices if this is the first armed epoch, then ask the guest to suspend.
    Suspend {
        /// Which epoch ends here.
        epoch: Epoch,
        /// Whether output is held from here on.
        armed: bool,
    },
    /// Close the epoch at every device.
    Postsuspend(Epoch),
    /// Let the engine copy.
    EngineCopy,
    /// Let every device prepare for the guest.
    Preresume(Epoch),
    /// Resume the guest.
    Resume,
    /// Tell the engine that the guest runs.
    EngineResumed,
    /// Send what is left of the epoch and `EPOCH_END`; watch for the acknowledgement.
    FinishEpoch {
        /// Which epoch.
        epoch: Epoch,
        /// As in [`Action::Suspend`].
        armed: bool,
    },
    /// Release the epoch at every device.
    Commit(Epoch),
    /// Start the interval (or retry) timer.
    StartTimer,
    /// Let the engine begin the next epoch.
    EngineContinue,
    /// Whatever the guest's state, make it run: retract a pending suspend, resume it if suspended.
    EnsureRunning,
    /// Decide who owns the guest. Answered by `ClaimWon`, `ClaimLost` or `ClaimUnknown`.
    Arbitrate,
    /// Tell the backup to destroy its copy; start waiting for its confirmation.
    SendStop(StopWhy),
    /// Stop the guest's vCPUs at once: it does not own itself any more.
    Freeze,
    /// Put devices and the engine back, decide the domain's fate. Answered by `CleanedUp`.
    CleanUp {
        /// What becomes of held output.
        output: Output,
        /// What becomes of the domain.
        fate: DomainFate,
    },
    /// Protection holds from this epoch on.
    ReportProtected(Epoch),
    /// An unarmed epoch is over.
    ReportUnarmed(Epoch),
    /// ALARM: no backup.
    ReportUnprotected(String),
    /// Output is held until an operator decides.
    ReportHolding(String),
    /// An epoch was given up.
    ReportAbandoned(String),
    /// The other host's copy won.
    ReportSuperseded(String),
    /// The guest ended by itself.
    ReportGuestEnded(GuestEnd),
    /// The machine is done; no event is looked at any more.
    End(Outcome),
}
