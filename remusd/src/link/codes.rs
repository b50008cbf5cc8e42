//! The numbered words of the vocabulary: reasons, roles, states. Their numbers are the wire's.

use serde::{Deserialize, Serialize};

/// How the guest is virtualised. PV is not listed: it cannot be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    /// Hardware virtualisation without emulated devices.
    Pvh,
    /// Hardware virtualisation with a device model.
    Hvm,
}

/// What the backup does by itself when it loses the primary (DESIGN section 3, "Without a witness").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OnPrimaryLoss {
    /// Waits for an operator who asserts that the primary is off.
    #[default]
    Wait,
    /// Activates its copy. Two live copies are possible: the primary goes on too when only the link is lost.
    Activate,
}

/// Why a `HELLO` was declined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[serde(rename_all = "kebab-case")]
pub enum RefuseCode {
    /// No common protocol version.
    Version = 1,
    /// The domain's name or UUID is in use on the backup.
    InUse = 2,
    /// The backup has too little free memory.
    Memory = 3,
    /// The offered generation is not newer than one that the backup knows.
    Generation = 4,
    /// The backup could not start its receiver.
    Receiver = 5,
    /// The backup could not read its host's state or write its own.
    Host = 6,
    /// The offer itself makes no sense.
    Offer = 7,
    /// The backup is shutting down.
    ShuttingDown = 8,
    /// The peer is not a party of this protection.
    NotParty = 9,
}

impl RefuseCode {
    pub(super) const ALL: [Self; 9] = [
        Self::Version,
        Self::InUse,
        Self::Memory,
        Self::Generation,
        Self::Receiver,
        Self::Host,
        Self::Offer,
        Self::ShuttingDown,
        Self::NotParty,
    ];
}

/// What a host is to a protection, as seen by its backup side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It never heard of it.
    None = 0,
    /// It holds a copy that may not be activated yet.
    Syncing = 1,
    /// It holds a copy that may be activated.
    Armed = 2,
    /// It is activating its copy.
    Activating = 3,
    /// Its copy was activated and runs.
    Active = 4,
    /// Its copy was discarded.
    Discarded = 5,
}

impl Role {
    pub(super) const ALL: [Self; 6] =
        [Self::None, Self::Syncing, Self::Armed, Self::Activating, Self::Active, Self::Discarded];
}

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[repr(u8)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// Not known, or not this side's guest.
    #[default]
    Unknown = 0,
    /// Running.
    Running = 1,
    /// Asked to suspend or suspended for a checkpoint.
    Suspended = 2,
    /// Paused by the toolstack.
    Paused = 3,
    /// Shut down.
    Shutdown = 4,
    /// Crashed.
    Crashed = 5,
    /// Running, but it does not react to suspend requests.
    Stuck = 6,
}

impl GuestState {
    pub(super) const ALL: [Self; 7] =
        [Self::Unknown, Self::Running, Self::Suspended, Self::Paused, Self::Shutdown, Self::Crashed, Self::Stuck];
}

/// Why a protection is ended on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// An operator or program unprotected the domain.
    Planned = 1,
    /// The guest powered off.
    Poweroff = 2,
    /// The guest rebooted.
    Reboot = 3,
    /// The guest crashed.
    Crash = 4,
    /// The domain was destroyed by somebody else.
    Destroyed = 5,
    /// The primary's remusd shuts down.
    Shutdown = 6,
    /// The primary gave up after an error of its own.
    Failed = 7,
}

impl StopReason {
    pub(super) const ALL: [Self; 7] =
        [Self::Planned, Self::Poweroff, Self::Reboot, Self::Crash, Self::Destroyed, Self::Shutdown, Self::Failed];
}

/// Why the backup cannot protect any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[serde(rename_all = "kebab-case")]
pub enum LostReason {
    /// The receiver or the incoming domain is gone.
    Receiver = 1,
    /// An epoch did not match its digest or its counts.
    Digest = 2,
    /// An epoch was larger than the backup may stage.
    Memory = 3,
    /// Frames came in an order that the protocol forbids.
    Protocol = 4,
    /// An operator discarded the copy.
    Discarded = 5,
    /// The backup's remusd shuts down.
    Shutdown = 6,
    /// The backup has begun to activate its copy.
    Claimed = 7,
    /// Something else on the backup failed.
    Host = 8,
}

impl LostReason {
    pub(super) const ALL: [Self; 8] = [
        Self::Receiver,
        Self::Digest,
        Self::Memory,
        Self::Protocol,
        Self::Discarded,
        Self::Shutdown,
        Self::Claimed,
        Self::Host,
    ];
}

/// Why a session was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The peer's bytes were not valid frames.
    Frame = 1,
    /// A valid frame in a state that has no place for it.
    Unexpected = 2,
    /// Something on the sender's host failed.
    Internal = 3,
}

impl ErrorCode {
    pub(super) const ALL: [Self; 3] = [Self::Frame, Self::Unexpected, Self::Internal];
}
