//! The words of the primary's state machine: its settings, states, events and actions.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Epoch;
use crate::link::{RecordKey, Token};

/// What the primary does when it has lost the backup and the token is its own: no witness, or one that is down (hazard F19).
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
    /// Whether a witness is configured: while it is up, who goes on alone has to win its record.
    pub witness: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            on_backup_loss: OnBackupLoss::Alone,
            arm_pages: 16 * 1024,
            max_unarmed: 6,
            suspend_retries: 3,
            witness: false,
        }
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
    /// Given to the backup on purpose; its copy runs, this one is destroyed.
    HandedOver(String),
}

/// How far the agreement on [`Token`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// The backup has our mode on disk.
    Agreed,
    /// The record is being armed anew; the mode is still the primary's token.
    Arming {
        /// Which arming; another one's result does not count.
        id: u64,
    },
    /// Our side of the new mode is being written to disk.
    Saving(Token),
    /// The backup has been told.
    Asked {
        /// Which proposal.
        seq: u64,
        /// The new mode.
        token: Token,
    },
}

/// How far a switchover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// None was asked for.
    No,
    /// The next epoch is the last one here.
    Requested,
    /// The guest stands still for its last epoch here.
    Leaving,
    /// It was called off: the guest is let go and protection goes on.
    Aborting,
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
    /// Switchover: the guest stands still, its last epoch here is on its way.
    ShippingLast(Epoch),
    /// Switchover: the last epoch is acknowledged, devices release its output.
    CommittingLast(Epoch),
    /// Switchover: that the guest is given away is being recorded, at the witness or on our disk.
    HandingOver(Epoch),
    /// Switchover: the backup has been told to run its copy.
    HandedOver(Epoch),
    /// The stop is being recorded at the witness. Output stays held.
    Recording(StopWhy),
    /// STOP is sent; its confirmation is awaited. Output stays held.
    Stopping(StopWhy),
    /// The witness is asked who owns the guest. Output stays held.
    Arbitrating(StopWhy),
    /// Nobody can say who owns the guest: output stays held until the witness answers or an operator decides.
    Holding(StopWhy),
    /// The backup has won the record: the guest is frozen, its output held, until the backup's copy runs or is given up.
    Yielding(StopWhy),
    /// Everything is being put back.
    CleaningUp(Outcome),
    /// The guest runs alone on an operator's word; the record still has to be won, lest the backup win it later.
    Unrecorded(Outcome),
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
    /// Arbitration: this host owns the guest, by this record (after [`Action::ForceRecord`] a newer one).
    ClaimWon(RecordKey),
    /// Arbitration: the other host owns the guest.
    ClaimLost(String),
    /// Arbitration: the witness does not tell. It may yet: `ClaimWon`, `ClaimLost` and `ClaimRefused` may follow.
    ClaimUnknown,
    /// Arbitration: the record is absent, rolled back or not ours; text says which. Only an operator can decide.
    ClaimRefused(String),
    /// The backup's copy has been activated.
    Superseded(String),
    /// The witness answers (again).
    WitnessUp,
    /// The witness does not answer any more.
    WitnessDown(String),
    /// The record is armed, by us, for this backup.
    RecordArmed {
        /// Which arming.
        id: u64,
        /// What was armed.
        key: RecordKey,
    },
    /// The record may not be armed; text says why.
    ArmRefused {
        /// Which arming.
        id: u64,
        /// Why.
        text: String,
    },
    /// The mode is on our disk.
    TokenSaved,
    /// The mode could not be written.
    TokenUnsaved(String),
    /// The backup has this proposal on disk.
    TokenAck {
        /// Which.
        seq: u64,
    },
    /// The record says stopped, by us.
    RecordStopped,
    /// The record says handed to the backup, by us.
    RecordHanded,
    /// Stop or hand-over: the backup has won the record before.
    RecordLost(String),
    /// Stop or hand-over: the witness does not tell.
    RecordUnknown(String),
    /// The watched record says that the backup's copy runs.
    RecordActive(String),
    /// The watched record says that the backup has given its claim up; its copy is gone and never ran.
    RecordForfeited,
    /// That the guest was handed over is on our disk.
    HandedOverSaved,
    /// It could not be written.
    HandedOverUnsaved(String),
    /// An operator wants the guest to run on the backup.
    HandoverRequested,
    /// The backup could not activate; nothing is left of its copy, which never ran.
    HandoverFailed(String),
    /// No word from the backup since it was told to run its copy.
    HandoverLate,
    /// An operator asserts that the backup's copy does not run and will not.
    AssumeAlone,
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

/// What becomes of the durable record of this protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It goes once everything is put back.
    Forget,
    /// It stays: [`Action::Forget`] comes later.
    Keep,
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
    /// Whatever the guest's state, make it run (but for `Freeze`): retract a pending suspend, resume it if suspended.
    EnsureRunning,
    /// Arm the record anew: a new generation and nonce, we as owner, this backup as peer. Answered by `RecordArmed` or `ArmRefused`,
    /// once that is known.
    ArmRecord {
        /// Comes back in the answer.
        id: u64,
    },
    /// Write the mode to disk. Answered by `TokenSaved` or `TokenUnsaved`.
    SaveToken(Token),
    /// Propose the mode to the backup.
    SendToken {
        /// Counts from 1.
        seq: u64,
        /// The mode.
        token: Token,
    },
    /// Claim exactly this record, however often asked. Answered by `ClaimWon`, `ClaimLost`, `ClaimRefused` or, as long as the witness
    /// does not tell, `ClaimUnknown`.
    Claim(RecordKey),
    /// The operator asserts that the backup is off: claim the record whatever it says. Answered as `Claim`.
    ForceRecord(RecordKey),
    /// Record that the guest runs here, after a won claim, however long that takes. Not answered.
    Activate(RecordKey),
    /// Record the stop. Answered by `RecordStopped`, `RecordLost` or `RecordUnknown`.
    StopRecord(RecordKey),
    /// Record that the backup may claim. Answered by `RecordHanded`, `RecordLost` or `RecordUnknown`.
    HandRecord(RecordKey),
    /// Watch the record that the backup has claimed. Answered by `RecordActive` or `RecordForfeited`, whenever that is.
    WatchRecord(RecordKey),
    /// Keep the guest suspended: the watchdog must not resume it any more. If it has done so, answer `EpochFailed`.
    HoldStill,
    /// Write to disk that the guest is handed over. Answered by `HandedOverSaved` or `HandedOverUnsaved`.
    SaveHandedOver,
    /// Tell the backup to run its copy; start waiting for its word (`HandoverLate`).
    SendHandover {
        /// The last epoch, which the backup has acknowledged.
        epoch: Epoch,
        /// The agreed mode.
        token: Token,
    },
    /// Refuse the switchover with this sentence.
    RefuseHandover(String),
    /// Write to disk that this copy lost: a restarted daemon must not take itself for the owner.
    SaveSuperseded,
    /// Tell the backup to destroy its copy; start waiting for its confirmation.
    SendStop(StopWhy),
    /// Stop the guest's vCPUs at once: it does not own itself any more.
    Freeze,
    /// Let its vCPUs go on.
    Unfreeze,
    /// Put devices and the engine back, decide the domain's fate. Answered by `CleanedUp`.
    CleanUp {
        /// What becomes of held output.
        output: Output,
        /// What becomes of the domain.
        fate: DomainFate,
        /// What becomes of the durable record.
        kept: Kept,
    },
    /// Remove the durable record.
    Forget,
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
    /// The mode of the protection is this one now, and why.
    ReportToken(Token, String),
    /// The backup has won the record; this copy is frozen and waits for what becomes of the other.
    ReportYielding(String),
    /// The backup has given its claim up.
    ReportForfeited,
    /// The switchover failed or was called off.
    ReportHandoverFailed(String),
    /// ALARM: the record does not say that the guest runs here, although an operator did; both copies may be live.
    ReportConflict(String),
    /// The machine is done; no event is looked at any more.
    End(Outcome),
}
