//! The machine's words: states, events, actions, reports.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::ids::Epoch;
use crate::link::{Frame, OnPrimaryLoss, RecordKey, Role, Token};
use crate::stream::{PageBatch, Record};

/// Where an incoming protection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No armed epoch is whole yet: the copy cannot be activated.
    Syncing,
    /// An armed epoch is whole: the copy can be activated. The session is open.
    Armed,
    /// As armed, but the session has ended: the copy waits for a decision.
    Waiting,
    /// The newest whole epoch's state and END are given to the receiver, which builds the domain. Nothing is acknowledged from here on.
    Activating,
    /// The domain is built; the witness is asked who owns it.
    Claiming,
    /// The record was won; it is read once more, since anything may have happened until the answer came (hazard F5).
    Confirming,
    /// The receiver was told to go.
    Starting,
    /// The copy runs here.
    Active,
    /// The record was lost. The built copy is kept, unstarted, until the winner runs or gives up.
    Yielding,
    /// The receiver is being ended and the incoming domain destroyed.
    Discarding,
    /// Nothing is left of the copy; the claim is being given up.
    Forfeiting,
    /// Nothing is left of the copy.
    Discarded,
}

impl State {
    /// What a host with such a copy is to the protection, as told to a peer that asks.
    #[must_use]
    pub fn role(self) -> Role {
        match self {
            Self::Syncing => Role::Syncing,
            // Lost to the primary: as good as one that waits, for whoever asks.
            Self::Armed | Self::Waiting | Self::Yielding => Role::Armed,
            Self::Activating | Self::Claiming | Self::Confirming | Self::Starting => Role::Activating,
            Self::Active => Role::Active,
            Self::Discarding | Self::Forfeiting | Self::Discarded => Role::Discarded,
        }
    }
}

/// On whose word a copy is activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authority {
    /// An operator asserted that the primary is off.
    Operator,
    /// The protection was made with `on_primary_loss=activate`.
    Policy,
    /// The witness decides.
    Witness,
    /// The primary handed the guest over.
    Handover,
}

/// Settings of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What the primary asked for at `HELLO`.
    pub on_primary_loss: OnPrimaryLoss,
    /// Whether a witness is configured. Whether it decides is [`Token`]'s, as agreed in the session.
    pub witness: bool,
    /// Most bytes of one staged epoch.
    pub staging_limit: usize,
    /// Most epochs before the newest that the receiver may not have taken in yet when it is acknowledged (hazard F11).
    pub backlog_epochs: usize,
    /// Most bytes of those epochs.
    pub backlog_bytes: u64,
}

/// What happens to a protection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The primary sent a frame.
    Frame(Frame),
    /// The receiver has taken in all of this epoch and of those before it.
    Drained(Epoch),
    /// Asked by [`Action::CheckAlive`]: receiver and incoming domain are there.
    Alive(Epoch),
    /// The receiver has built the domain and waits for GO.
    CopyReady,
    /// The copy runs.
    CopyRuns,
    /// The receiver or the incoming domain is gone, or could not be fed.
    ReceiverDied(String),
    /// Nothing was heard from the primary for the detection time, counted on after the session's end.
    PrimarySuspect,
    /// A suspected primary was heard again.
    PrimaryAlive,
    /// The session has ended.
    LinkClosed(String),
    /// An operator wants the copy activated.
    OperatorFailover {
        /// The operator asserts that the primary host is off.
        primary_is_off: bool,
    },
    /// An operator wants the copy destroyed.
    OperatorDiscard,
    /// Nothing was heard for one more interval after [`Action::StartGrace`].
    GraceOver,
    /// Asked by [`Action::CheckLan`]: the copy would be reachable.
    LanUp,
    /// It would not; text says which interface.
    LanDown(String),
    /// The proposal is on our disk.
    TokenSaved {
        /// Which.
        seq: u64,
    },
    /// It could not be written.
    TokenUnsaved(String),
    /// The guest cannot take its place here, so a hand-over fails; text says why.
    HandoverImpossible(String),
    /// The witness gave us the protection, by this record (after [`Action::Force`] a newer one).
    ClaimWon(RecordKey),
    /// The witness gave it to somebody else.
    ClaimLost(String),
    /// The witness does not tell: neither won nor lost. It may yet, by the other events of its kind.
    ClaimUnknown,
    /// The record is absent, rolled back or not ours; text says which. Only an operator can decide.
    ClaimRefused(String),
    /// The record still says claimed by us.
    StillMine,
    /// The watched record says that the primary runs the guest, or has stopped protecting it.
    RecordActive(String),
    /// The watched record says that the winner has given up.
    RecordForfeited,
    /// No claim of ours is left at the witness.
    Forfeited,
    /// An operator asserts that the guest runs nowhere else although the witness does not answer.
    AssumeAlone,
    /// The primary has opened a newer session for the same protection.
    Replaced,
    /// This daemon ends.
    Shutdown,
    /// Nothing is left of receiver and incoming domain.
    Destroyed,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give the receiver configuration and preamble.
    FeedHead {
        /// xl's JSON.
        config: Bytes,
        /// libxc's headers and static records.
        preamble: Bytes,
    },
    /// Give the receiver pages.
    FeedPages(PageBatch),
    /// All of this epoch is given; tell when it is taken in.
    FeedMark(Epoch),
    /// Look whether receiver and incoming domain are there; answer [`Event::Alive`] or [`Event::ReceiverDied`].
    CheckAlive(Epoch),
    /// Send a frame to the primary, if the session is open.
    Send(Frame),
    /// End the session after what was sent.
    CloseLink,
    /// Give the receiver this state and END.
    FinishCopy {
        /// The epoch that will run.
        epoch: Epoch,
        /// Its state.
        state: Vec<Record>,
    },
    /// Wait one more interval; answer [`Event::GraceOver`].
    StartGrace,
    /// Look whether the guest would be reachable here; answer [`Event::LanUp`] or [`Event::LanDown`].
    CheckLan,
    /// Write this proposal to disk; answer [`Event::TokenSaved`] or [`Event::TokenUnsaved`].
    SaveToken {
        /// Which.
        seq: u64,
        /// The mode.
        token: Token,
    },
    /// Claim exactly this record. Answered by `ClaimWon`, `ClaimLost`, `ClaimRefused` or, as long as the witness does not tell,
    /// `ClaimUnknown`.
    Claim(RecordKey),
    /// An operator asserts that the primary is off: claim the record whatever it says. Answered as `Claim`.
    Force(RecordKey),
    /// Read the record once more. Answered by `StillMine` or `ClaimLost`, once that is known.
    ConfirmClaim(RecordKey),
    /// Record that the copy runs here, after a won claim, however long that takes. Not answered.
    Activate(RecordKey),
    /// Record that the copy runs here whatever the record says, however long that takes: an operator decided. Not answered.
    ForceActive,
    /// Give a sent claim up once its outcome is known; nothing is left of the copy. Answered by `Forfeited`, whenever that is.
    Forfeit(RecordKey),
    /// Watch the record that another has won. Answered by `RecordActive` or `RecordForfeited`, whenever that is.
    WatchRecord(RecordKey),
    /// Tell the receiver to rename and unpause its copy.
    Go,
    /// End the receiver and destroy the incoming domain; answer [`Event::Destroyed`], however long that takes.
    DestroyCopy,
    /// Refuse the operator's command with this sentence.
    Refuse(String),
    /// Tell the world.
    Report(Report),
}

/// News about a protection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The first armed epoch is whole.
    Armed(Epoch),
    /// Nothing is heard from the primary; what follows from it.
    Suspect(String),
    /// The session has ended but the copy is kept; why, and what can be done.
    Waiting(String),
    /// The copy is being activated.
    Activating(Epoch, Authority),
    /// The copy runs.
    Active(Epoch),
    /// The copy could not be activated.
    ActivationFailed(String),
    /// The copy would not be reachable here, so it is not activated; why.
    Abstaining(String),
    /// The witness does not say whether the copy may run.
    WitnessSilent,
    /// The mode is this one now.
    Token(Token),
    /// The mode could not be written to disk; the primary keeps the stricter one.
    TokenUnsaved(String),
    /// The copy was destroyed.
    Discarded(String),
}
