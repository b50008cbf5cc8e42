//! One incoming protection as the daemon sees it: a task of its own that outlives its link.
//!
//! Losing the link leaves the copy waiting for a decision (R9); losing the daemon closes the receiver's pipe, and the stock
//! receiver then destroys what it has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::drill::Material;
use super::driver::{Driver, Input};
use super::error::CommandError;
use super::host::BackupHost;
use super::machine::{Authority, State};
use super::receiver::Receiver;
use super::record::{IncomingRecord, RecordStore};
use super::registry::BackupSettings;
use crate::ids::{DomId, Epoch, ProtectionId, SessionKey};
use crate::link::session::Session;
use crate::link::{Heartbeat, ProtectOffer, Role, Token};
use crate::ops::EventLog;
use crate::protect::ownership::Opened;
use crate::witness::Host;

/// An incoming protection as it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct IncomingStatus {
    /// What was agreed with the primary.
    pub offer: ProtectOffer,
    /// The primary as it named itself.
    pub peer: String,
    /// The session.
    pub key: SessionKey,
    /// Where it stands.
    pub state: State,
    /// Who decides when one side is lost.
    pub token: Token,
    /// The newest acknowledged epoch.
    pub acked: Option<Epoch>,
    /// When that was.
    pub acked_at: Option<Instant>,
    /// The newest whole epoch; it is the one that an activation starts.
    pub whole: Option<Epoch>,
    /// The domain that holds the copy, once the receiver has created it.
    pub domid: Option<DomId>,
    /// Epochs that the receiver has not taken in yet.
    pub backlog_epochs: u32,
    /// Bytes that the receiver has not taken in yet.
    pub backlog_bytes: u64,
    /// Whether the session with the primary is open.
    pub link_open: bool,
    /// Whether nothing is heard from the primary.
    pub suspect: bool,
    /// The primary's last heartbeat and when it came.
    pub heartbeat: Option<(Heartbeat, Instant)>,
    /// How the activation went, once there was one.
    pub activation: Option<ActivationReport>,
    /// One sentence: what an operator should know or do.
    pub detail: String,
}

impl IncomingStatus {
    /// What this host is to the protection, as told to a peer that asks.
    #[must_use]
    pub fn role(&self) -> Role {
        self.state.role()
    }
}

/// How long an activation took, in milliseconds from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivationReport {
    /// The epoch that runs.
    pub epoch: Epoch,
    /// On whose word.
    pub authority: Authority,
    /// Until the receiver had taken in what was queued, and built the domain with its devices.
    pub built_ms: u64,
    /// Until ownership was decided.
    pub claimed_ms: u64,
    /// Until the copy ran.
    pub running_ms: u64,
}

/// What an operator or the registry wants.
pub(super) enum Command {
    Failover { primary_is_off: bool, reply: oneshot::Sender<Result<ActivationReport, CommandError>> },
    AssumeAlone { reply: oneshot::Sender<Result<(), CommandError>> },
    Discard { reply: oneshot::Sender<Result<(), CommandError>> },
    Drill { reply: oneshot::Sender<Result<Material, CommandError>> },
    Replace,
    Shutdown,
}

/// A handle to one incoming protection; cheap to clone. The protection lives on without it.
#[derive(Clone, Debug)]
pub struct IncomingHandle {
    commands: mpsc::UnboundedSender<Input>,
    status: watch::Receiver<IncomingStatus>,
}

impl IncomingHandle {
    /// As it stands now.
    #[must_use]
    pub fn status(&self) -> IncomingStatus {
        self.status.borrow().clone()
    }

    /// To follow it. The sender goes away when nothing can change any more.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<IncomingStatus> {
        self.status.clone()
    }

    /// Activates the copy and waits until it runs.
    ///
    /// # Errors
    /// [`CommandError::Refused`] if it may not be activated, [`CommandError::Failed`] if it could not be.
    pub async fn failover(&self, primary_is_off: bool) -> Result<ActivationReport, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Failover { primary_is_off, reply })?;
        answer.await.map_err(|_| CommandError::Gone)?
    }

    /// An operator asserts that the guest runs nowhere else, although the witness does not answer: starts the built copy.
    ///
    /// # Errors
    /// [`CommandError::Refused`] if the copy does not wait for the witness.
    pub async fn assume_alone(&self) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::AssumeAlone { reply })?;
        answer.await.map_err(|_| CommandError::Gone)?
    }

    /// What a drill needs: the copy's last whole epoch.
    pub(super) async fn drill(&self) -> Result<Material, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Drill { reply })?;
        answer.await.map_err(|_| CommandError::Gone)?
    }

    /// Destroys the copy and waits until nothing is left of it.
    ///
    /// # Errors
    /// [`CommandError::Refused`] if it must not be destroyed.
    pub async fn discard(&self) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Discard { reply })?;
        answer.await.map_err(|_| CommandError::Gone)?
    }

    /// Ends it because the daemon ends: tells the primary, destroys the copy (nobody could feed it any more) and waits for that. An activated
    /// copy runs on; one that is being activated is waited for.
    pub async fn shutdown(&self) {
        self.end(Command::Shutdown).await;
    }

    /// Ends it because the primary has opened a newer session, and waits for the copy's end, or until that is out of the question because
    /// an activation was faster.
    ///
    /// # Errors
    /// [`CommandError::Gone`] if nothing takes commands although there is a copy.
    pub(super) async fn replace(&self) -> Result<(), CommandError> {
        self.command(Command::Replace)?;
        self.wait_until(|state| {
            use State::{Armed, Discarding, Syncing, Waiting, Yielding};
            !matches!(state, Syncing | Armed | Waiting | Yielding | Discarding)
        })
        .await;
        Ok(())
    }

    /// Waits until the copy is destroyed that is being destroyed.
    pub(super) async fn destroyed(&self) {
        self.wait_until(|state| state != State::Discarding).await;
    }

    async fn end(&self, command: Command) {
        if self.command(command).is_err() {
            return;
        }
        // A claim that is still being given up is on disk: the next run of the daemon goes on with that.
        self.wait_until(|state| matches!(state, State::Discarded | State::Forfeiting | State::Active)).await;
    }

    async fn wait_until(&self, reached: impl Fn(State) -> bool) {
        let mut status = self.status.clone();
        // An error means that the task has ended: nothing can change any more.
        let _ = status.wait_for(|status| reached(status.state)).await;
    }

    fn command(&self, command: Command) -> Result<(), CommandError> {
        let sent = self.commands.send(Input::Command(command));
        sent.map_err(|_| match self.status.borrow().state {
            State::Active => CommandError::Refused("the copy was activated and is an ordinary domain now".into()),
            _ => CommandError::Gone,
        })
    }
}

/// Everything that a new protection needs.
pub(super) struct Start {
    pub session: Session,
    pub offer: ProtectOffer,
    pub peer: String,
    pub key: SessionKey,
    pub receiver: Receiver,
    pub record: IncomingRecord,
    /// The witness and the primary as it knows it, if one is used.
    pub witness: Option<(Opened, Host)>,
    pub host: Arc<dyn BackupHost>,
    pub records: Arc<dyn RecordStore>,
    pub events: Arc<EventLog>,
    pub settings: Arc<BackupSettings>,
}

/// Starts the protection's task.
pub(super) fn start(start: Start) -> IncomingHandle {
    let (commands, inputs) = mpsc::unbounded_channel();
    let status = IncomingStatus {
        offer: start.offer.clone(),
        peer: start.peer.clone(),
        key: start.key,
        state: State::Syncing,
        token: Token::Primary,
        acked: None,
        acked_at: None,
        whole: None,
        domid: None,
        backlog_epochs: 0,
        backlog_bytes: 0,
        link_open: true,
        suspect: false,
        heartbeat: None,
        activation: None,
        detail: "receiving the first copy".into(),
    };
    let (status_in, status) = watch::channel(status);
    let driver = Driver::new(start, commands.clone(), inputs, status_in);
    tokio::spawn(driver.run());
    IncomingHandle { commands, status }
}

/// The name of the domain that holds the copy until it is activated.
#[must_use]
pub fn incoming_name(domain: &str) -> String {
    format!("{domain}{}", crate::stream::handshake::INCOMING_SUFFIX)
}

/// Finds the protection in a primary's offer.
pub(super) fn detection(offer: &ProtectOffer) -> Duration {
    Duration::from_millis(u64::from(offer.detection_ms))
}

/// The id of a protection as events name it.
pub(super) fn domain_ref(id: ProtectionId, name: &str, domid: Option<DomId>) -> crate::ops::DomainRef {
    crate::ops::DomainRef { domid, name: name.to_owned(), uuid: id }
}
