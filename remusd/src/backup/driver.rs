//! Carries out what the machine decides for one incoming protection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use devices::Copies;
use devices::mirror::Standby;
use devices::script::ScriptStandby;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::copy::{self, Whose};
use super::error::CommandError;
use super::feed::{Feed, FeedEvent};
use super::host::BackupHost;
use super::incoming::{ActivationReport, Command, IncomingStatus, Start, detection, incoming_name};
use super::machine::{Action, Authority, Event, Machine, Policy, State};
use super::record::{IncomingRecord, Phase, RecordStore};
use super::registry::BackupSettings;
use crate::audit::{Check, Comparer};
use crate::gray::Watch;
use crate::ids::{DomId, Epoch};
use crate::link::session::{Outbox, Report as Beat, SessionEvent};
use crate::link::{CloseReason, EpochEnd, Frame, GuestState, Token};
use crate::ops::{EventKind, EventLog};
use crate::stream::PlainComposer;
use crate::witness::Health;
use crate::xen::PageHash;

mod audit;
mod disks;
mod drill;
mod gate;
mod gray;
mod news;
pub(super) mod witness;

/// What the driver's tasks and handles tell it.
pub(super) enum Input {
    Command(Command),
    Feed(FeedEvent),
    Ready,
    Runs,
    /// The receiver's output ended or made no sense.
    OutputEnded(String),
    /// The receiver has ended; its last words.
    ProcessEnded(String),
    /// Whether the guest could run here and be reached.
    Place(Result<(), String>),
    /// Whether the copy is there.
    Checked(Epoch, Result<Option<DomId>, String>),
    Destroyed,
    /// The witness's answer.
    Witness(Event),
    WitnessAlarm(String),
    /// Whether the witness answers this host.
    WitnessHealth(Health),
    /// The witness knows that the copy runs here.
    Recorded,
    /// What was read of the copy for this check.
    Audited(Check, Result<Vec<Option<PageHash>>, String>),
    /// The copy's interfaces are open, or could not be.
    GateOpen(Result<(), String>),
    /// Every disk has all of this epoch.
    DisksHold(EpochEnd),
    /// The disks are those of the activated epoch, and the copy can be built with this.
    DisksReady(Result<Bytes, String>),
}

/// When an activation's steps were done.
struct Activation {
    epoch: Epoch,
    authority: Authority,
    began: Instant,
    built: Option<Instant>,
    claimed: Option<Instant>,
}

pub(super) struct Driver {
    machine: Machine,
    whose: Whose,
    detection: Duration,
    outbox: Outbox,
    session: Option<mpsc::Receiver<SessionEvent>>,
    inputs: mpsc::UnboundedReceiver<Input>,
    tell: mpsc::UnboundedSender<Input>,
    feed: Option<Feed>,
    kill: CancellationToken,
    ended: watch::Receiver<bool>,
    said: Option<String>,
    /// When the silence after the session's end becomes suspicious.
    suspect_at: Option<Instant>,
    /// When the further interval after a suspicion is over.
    grace_at: Option<Instant>,
    /// The bridges that the guest's interfaces will be on.
    bridges: Vec<String>,
    activation: Option<Activation>,
    failover: Option<oneshot::Sender<Result<ActivationReport, CommandError>>>,
    discard: Option<oneshot::Sender<Result<(), CommandError>>>,
    refused: Option<String>,
    asking: Option<witness::Asking>,
    /// Configuration and preamble as the primary sent them.
    fed_head: Option<(Bytes, Bytes)>,
    drill: Option<drill::Running>,
    clock_told: bool,
    /// Whether the witness was said to be out of this host's reach.
    witness_away: bool,
    unread_told: bool,
    comparer: Comparer,
    disks: Copies,
    /// The copy is being destroyed: nobody needs its disks any more.
    unwanted: CancellationToken,
    gray: Watch,
    record: IncomingRecord,
    status: watch::Sender<IncomingStatus>,
    host: Arc<dyn BackupHost>,
    records: Arc<dyn RecordStore>,
    events: Arc<EventLog>,
    settings: Arc<BackupSettings>,
}

impl Driver {
    pub(super) fn new(
        start: Start,
        tell: mpsc::UnboundedSender<Input>,
        inputs: mpsc::UnboundedReceiver<Input>,
        status: watch::Sender<IncomingStatus>,
    ) -> Self {
        let kill = CancellationToken::new();
        let (ended_in, ended) = watch::channel(false);
        tokio::spawn(copy::watch_process(start.receiver.process, kill.clone(), ended_in, tell.clone()));
        tokio::spawn(copy::watch_output(start.receiver.output, tell.clone()));
        let feed_tell = tell.clone();
        let feed = Feed::start(start.receiver.input, move |event| {
            // The protection may have ended meanwhile.
            let _ = feed_tell.send(Input::Feed(event));
        });
        let settings = start.settings;
        let asking = start.witness.map(|(opened, peer)| witness::Asking::start(opened, peer, tell.clone()));
        Self {
            machine: Machine::new(Policy {
                on_primary_loss: start.offer.on_primary_loss,
                witness: start.offer.witness.is_some(),
                staging_limit: settings.staging_limit,
                backlog_epochs: settings.backlog_epochs,
                backlog_bytes: settings.backlog_bytes,
            }),
            whose: Whose { uuid: start.offer.protection, name: start.offer.domain.clone() },
            detection: detection(&start.offer),
            outbox: start.session.outbox,
            session: Some(start.session.events),
            inputs,
            tell,
            feed: Some(feed),
            kill,
            ended,
            said: None,
            suspect_at: None,
            grace_at: None,
            bridges: Vec::new(),
            activation: None,
            failover: None,
            discard: None,
            refused: None,
            asking,
            fed_head: None,
            drill: None,
            clock_told: false,
            witness_away: false,
            unread_told: false,
            comparer: Comparer::new(),
            disks: Copies {
                mirrored: Standby::new(&settings.disk_sockets, Vec::new()),
                scripted: ScriptStandby::default(),
            },
            unwanted: CancellationToken::new(),
            gray: Watch::backup(detection(&start.offer)),
            record: start.record,
            status,
            host: start.host,
            records: start.records,
            events: start.events,
            settings,
        }
    }

    pub(super) async fn run(mut self) {
        self.publish(EventKind::Receiving, "receiving the first copy".into());
        loop {
            let told = !self.record.owed || self.asking.is_none();
            let over = matches!(self.machine.state(), State::Discarded | State::Active) && told;
            if over && self.session.is_none() {
                return;
            }
            let limit = self.read_limit();
            let full = self.feed.as_ref().is_some_and(|feed| feed.queued() >= limit);
            let (suspect_at, grace_at) = (self.suspect_at, self.grace_at);
            tokio::select! {
                Some(input) = self.inputs.recv() => self.input(input).await,
                event = receive(&mut self.session), if self.session.is_some() && !full => self.link(event).await,
                () = room(self.feed.as_ref(), limit), if full => {}
                () = tokio::time::sleep_until(suspect_at.unwrap_or_else(Instant::now)), if suspect_at.is_some() => {
                    self.suspect_at = None;
                    self.suspected().await;
                }
                () = tokio::time::sleep_until(grace_at.unwrap_or_else(Instant::now)), if grace_at.is_some() => {
                    self.grace_at = None;
                    self.step(Event::GraceOver);
                }
            }
            self.update();
        }
    }

    /// How many bytes may wait for the receiver before we stop reading (R8). Armed epochs are bounded by staging and backlog, so that
    /// only a primary that does not wait for acknowledgements reaches that limit.
    fn read_limit(&self) -> usize {
        if self.machine.passes_through() {
            return self.settings.feed_limit;
        }
        let backlog = usize::try_from(self.settings.backlog_bytes).unwrap_or(usize::MAX);
        self.settings.feed_limit.saturating_add(self.settings.staging_limit).saturating_add(backlog)
    }

    async fn link(&mut self, event: Option<SessionEvent>) {
        match event {
            Some(SessionEvent::Frame(mut frame)) => {
                match &mut frame {
                    Frame::Heartbeat(beat) => self.heartbeat(*beat),
                    Frame::Audit(sample) => self.comparer.sample(sample.clone()),
                    Frame::EpochEnd(end) if self.waits_for_disks(&*end) => return,
                    Frame::Config(config) => match self.take_disks(config).await {
                        Ok(without) => *config = without,
                        Err(text) => return self.step(Event::ReceiverDied(text)),
                    },
                    _ => {}
                }
                if matches!(frame, Frame::Handover { .. })
                    && let Err(text) = self.preflight().await
                {
                    return self.step(Event::HandoverImpossible(text));
                }
                self.step(Event::Frame(frame));
            }
            Some(SessionEvent::Suspect { .. }) => {
                self.status.send_modify(|status| status.suspect = true);
                self.suspected().await;
            }
            Some(SessionEvent::Alive) => {
                self.status.send_modify(|status| status.suspect = false);
                self.step(Event::PrimaryAlive);
            }
            // A backup sends no epochs.
            Some(SessionEvent::AckLate(_)) => {}
            Some(SessionEvent::Starved { by }) => self.starved(by),
            Some(SessionEvent::Closed(reason)) => self.closed(&reason),
            None => self.closed(&CloseReason::Local),
        }
    }

    fn closed(&mut self, reason: &CloseReason) {
        self.session = None;
        self.suspect_at = Some(Instant::now() + self.detection);
        self.status.send_modify(|status| status.link_open = false);
        self.step(Event::LinkClosed(reason.to_string()));
    }

    fn heartbeat(&mut self, beat: crate::link::Heartbeat) {
        let skewed = news::clock_skew(beat.wall_clock_ms, crate::link::session::wall_clock_ms());
        if let Some(text) = skewed.filter(|_| !self.clock_told) {
            self.clock_told = true;
            self.publish(EventKind::Degraded, text);
        }
        let now = std::time::Instant::now();
        self.status.send_modify(|status| status.heartbeat = Some((beat, now)));
        self.observe(beat);
    }

    /// Nothing is heard. What would make the activation fail is looked for before it is begun.
    async fn suspected(&mut self) {
        if self.machine.activates_by_policy()
            && let Err(text) = self.preflight().await
        {
            self.publish(EventKind::ActivationFailed, text);
            // Tried again, and meanwhile an operator may decide.
            self.suspect_at = Some(Instant::now() + self.detection);
            return;
        }
        self.step(Event::PrimarySuspect);
    }

    /// Whether the receiver can give the copy its name. If it cannot it destroys the copy, so this is asked before.
    async fn preflight(&self) -> Result<(), String> {
        copy::name_is_free(self.host.as_ref(), &self.whose).await
    }

    async fn input(&mut self, input: Input) {
        match input {
            Input::Command(command) => self.command(command).await,
            Input::Feed(FeedEvent::Drained(epoch)) => {
                self.begin_audit(epoch);
                self.step(Event::Drained(epoch));
            }
            Input::Audited(check, read) => self.end_audit(&check, read),
            Input::GateOpen(opened) => self.go(opened),
            Input::DisksHold(end) => self.step(Event::Frame(Frame::EpochEnd(end))),
            Input::DisksReady(ready) => self.disks_ready(ready),
            // The receiver's end explains it better and follows.
            Input::Feed(FeedEvent::Failed(error)) => {
                tracing::info!(error, "the receiver does not take data any more");
                self.kill_unless_started();
            }
            Input::Ready => {
                self.mark(|activation, now| activation.built = Some(now));
                self.step(Event::CopyReady);
            }
            Input::Runs => self.step(Event::CopyRuns),
            Input::OutputEnded(said) => {
                self.said = Some(said);
                self.kill_unless_started();
                self.receiver_over().await;
            }
            Input::ProcessEnded(said) => {
                self.said = Some(said);
                self.receiver_over().await;
            }
            Input::Checked(epoch, Ok(Some(domid))) => {
                self.status.send_modify(|status| status.domid = Some(domid));
                self.step(Event::Alive(epoch));
            }
            Input::Checked(_, Ok(None)) => {
                let text = format!("the domain {} is gone", incoming_name(&self.whose.name));
                self.step(Event::ReceiverDied(text));
            }
            Input::Checked(_, Err(error)) => {
                self.step(Event::ReceiverDied(format!("cannot see whether the copy is there: {error}")));
            }
            Input::Place(place) => {
                self.placed(place.is_ok());
                self.step(place.map_or_else(Event::LanDown, |()| Event::LanUp));
            }
            Input::Destroyed => self.step(Event::Destroyed),
            Input::Witness(event) => {
                self.arbitration(&event);
                self.step(event);
            }
            Input::WitnessHealth(health) => self.witness_health(&health),
            Input::WitnessAlarm(text) => self.publish(EventKind::WitnessTrouble, text),
            Input::Recorded => {
                self.record.owed = false;
                self.save(self.record.phase);
            }
        }
    }

    /// Makes a receiver end that is of no use any more; one that was told to go decides itself.
    fn kill_unless_started(&self) {
        if !matches!(self.machine.state(), State::Starting | State::Active) {
            self.kill.cancel();
        }
    }

    /// The receiver has ended, or says nothing more. After GO only the domain tells how it went.
    async fn receiver_over(&mut self) {
        let ended = *self.ended.borrow();
        if !ended {
            return;
        }
        let said = self.said.clone().unwrap_or_else(|| "the receiver has ended".into());
        if self.machine.state() == State::Starting {
            let mut backoff = copy::patient(Duration::from_millis(20), Duration::from_secs(1));
            let domains = loop {
                match self.host.domains().await {
                    Ok(domains) => break domains,
                    // Nothing can be concluded from not knowing: the copy may run.
                    Err(error) => {
                        tracing::warn!("looking for the started copy: {error}");
                        let _ = backoff.wait().await;
                    }
                }
            };
            if domains.iter().any(|domain| self.whose.is_activated(domain)) {
                self.step(Event::CopyRuns);
                return;
            }
        }
        self.step(Event::ReceiverDied(said));
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Failover { primary_is_off, reply } => {
                let decidable = matches!(self.machine.state(), State::Armed | State::Waiting);
                if decidable && let Err(text) = self.preflight().await {
                    let _ = reply.send(Err(CommandError::Refused(text)));
                    return;
                }
                self.refused = None;
                self.step(Event::OperatorFailover { primary_is_off });
                match self.refused.take() {
                    // The asker may have gone; then nobody needs the answer.
                    Some(text) => drop(reply.send(Err(CommandError::Refused(text)))),
                    None => self.failover = Some(reply),
                }
            }
            Command::AssumeAlone { reply } => {
                self.refused = None;
                self.step(Event::AssumeAlone);
                let answer = self.refused.take().map_or(Ok(()), |text| Err(CommandError::Refused(text)));
                drop(reply.send(answer));
            }
            Command::Discard { reply } => {
                self.refused = None;
                self.step(Event::OperatorDiscard);
                match self.refused.take() {
                    Some(text) => drop(reply.send(Err(CommandError::Refused(text)))),
                    None => self.discard = Some(reply),
                }
            }
            Command::Drill { reply } => drop(reply.send(self.drill_material())),
            Command::Replace => self.step(Event::Replaced),
            Command::Shutdown => self.step(Event::Shutdown),
        }
    }

    fn step(&mut self, event: Event) {
        let mut actions = VecDeque::from(self.machine.step(event));
        while let Some(action) = actions.pop_front() {
            if let Some(event) = self.perform(action) {
                actions.extend(self.machine.step(event));
            }
        }
    }

    /// Does one thing; what goes wrong at once comes back as an event.
    fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::FeedHead { config, preamble } => match self.head(&config, &preamble) {
                Ok(pieces) => {
                    self.fed_head = Some((config, preamble));
                    self.feed(pieces);
                }
                Err(text) => {
                    return Some(Event::ReceiverDied(format!("the primary's configuration cannot be used: {text}")));
                }
            },
            Action::FeedPages(batch) => match PlainComposer::pages(&batch) {
                Ok(pieces) => {
                    self.comparer.fed(&batch);
                    if let Some(feed) = &self.feed {
                        feed.pages(batch.entries, pieces);
                    }
                }
                Err(error) => return Some(Event::ReceiverDied(error.to_string())),
            },
            Action::FeedMark(epoch) => {
                if let Some(feed) = &self.feed {
                    feed.mark(epoch);
                }
            }
            Action::CheckAlive(epoch) => {
                if *self.ended.borrow() {
                    return Some(Event::ReceiverDied(
                        self.said.clone().unwrap_or_else(|| "the receiver has ended".into()),
                    ));
                }
                let known = self.status.borrow().domid;
                tokio::spawn(copy::check_alive(
                    Arc::clone(&self.host),
                    self.whose.clone(),
                    known,
                    epoch,
                    self.machine.armed() == Some(epoch),
                    self.disks.clone(),
                    self.tell.clone(),
                ));
            }
            Action::Send(frame) => {
                if let Frame::Ack { epoch, .. } = &frame {
                    self.outbox.report(Beat { epoch: *epoch, guest: GuestState::Unknown, resumed_at: None });
                    self.status.send_modify(|status| status.acked_at = Some(std::time::Instant::now()));
                }
                // A session that has just ended has its own event.
                let _ = self.outbox.control(frame);
            }
            Action::CloseLink => self.outbox.close(),
            Action::FinishCopy { epoch, state } => {
                self.end_drill();
                self.finish_copy(epoch, &state);
            }
            Action::StartGrace => self.grace_at = Some(Instant::now() + self.detection),
            Action::CheckLan => {
                let tell = self.tell.clone();
                let (host, whose) = (Arc::clone(&self.host), self.whose.clone());
                let bridges = self.bridges.clone();
                tokio::spawn(async move {
                    let _ = tell.send(Input::Place(copy::place(host.as_ref(), &whose, &bridges).await));
                });
            }
            Action::SaveToken { seq, token } => {
                self.record.token = token;
                let saved = self.records.save(&self.record);
                if let (Some(key), Some(asking), Ok(())) = (token.record(), &self.asking, &saved) {
                    asking.accept(key);
                }
                return Some(match saved {
                    Ok(()) => Event::TokenSaved { seq },
                    Err(error) => Event::TokenUnsaved(error.to_string()),
                });
            }
            // A restarted daemon must give up what this one may have won (hazard F6).
            asked @ (Action::Claim(_)
            | Action::Force(_)
            | Action::ConfirmClaim(_)
            | Action::Activate(_)
            | Action::ForceActive
            | Action::Forfeit(_)
            | Action::WatchRecord(_)) => {
                match asked {
                    Action::Claim(_) | Action::Force(_) | Action::ForceActive => self.owe(true),
                    Action::ConfirmClaim(key) | Action::Activate(key) => self.record.token = Token::Witness(key),
                    Action::WatchRecord(_) => self.owe(false),
                    _ => {}
                }
                match &mut self.asking {
                    Some(asking) => asking.carry_out(asked),
                    // The machine asks only after the primary has named a record.
                    None => tracing::error!(domain = self.whose.name, "no witness is configured"),
                }
            }
            Action::Go => {
                self.mark(|activation, now| activation.claimed = Some(now));
                self.save(Phase::Starting);
                self.open_gate();
            }
            Action::DestroyCopy => {
                self.end_drill();
                self.unwanted.cancel();
                // Closing its input is what ends the stock receiver.
                self.feed = None;
                tokio::spawn(copy::destroy(
                    Arc::clone(&self.host),
                    self.whose.clone(),
                    self.ended.clone(),
                    self.kill.clone(),
                    self.settings.stop_patience,
                    self.disks.clone(),
                    self.tell.clone(),
                ));
            }
            Action::Refuse(text) => self.refused = Some(text),
            Action::Report(report) => self.report(report),
        }
        None
    }

    /// The head of the receiver's stream; the configuration must be of the domain that was offered.
    fn head(&mut self, config: &[u8], preamble: &Bytes) -> Result<Vec<Bytes>, String> {
        let text = std::str::from_utf8(config).map_err(|error| error.to_string())?;
        let json: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        self.bridges = copy::bridges(&json);
        let field = |name: &str| json["c_info"][name].as_str().unwrap_or_default().to_owned();
        if field("name") != self.whose.name {
            return Err(format!("it is of domain {:?}, not of {:?}", field("name"), self.whose.name));
        }
        if field("uuid").parse() != Ok(self.whose.uuid) {
            return Err(format!("it has uuid {}, not {}", field("uuid"), self.whose.uuid));
        }
        let config = self.close_gate(text)?;
        PlainComposer::head(&config, preamble).map_err(|error| error.to_string())
    }

    fn feed(&self, pieces: Vec<Bytes>) {
        if let Some(feed) = &self.feed {
            feed.bytes(pieces);
        }
    }

    fn mark(&mut self, set: impl FnOnce(&mut Activation, Instant)) {
        if let Some(activation) = &mut self.activation {
            set(activation, Instant::now());
        }
    }

    /// Saves how far it came. A full disk must not keep a copy from being activated: what a record misses is seen from the domains.
    fn save(&mut self, phase: Phase) {
        self.record.phase = phase;
        if let Err(error) = self.records.save(&self.record) {
            tracing::error!(domain = self.whose.name, %error, "cannot record the protection's state; going on");
        }
    }

    /// Whether the witness has still to be told what becomes of a claim.
    fn owe(&mut self, owed: bool) {
        self.record.owed = owed;
        self.save(self.record.phase);
    }

    fn update(&mut self) {
        let (backlog_epochs, backlog_bytes) = self.machine.backlog();
        let machine = &self.machine;
        self.status.send_if_modified(|status| {
            let before = (status.state, status.acked, status.whole, status.backlog_epochs, status.backlog_bytes);
            let now = (machine.state(), machine.acked(), machine.whole(), backlog_epochs, backlog_bytes);
            (status.state, status.acked, status.whole, status.backlog_epochs, status.backlog_bytes) = now;
            before != now
        });
    }
}

async fn receive(session: &mut Option<mpsc::Receiver<SessionEvent>>) -> Option<SessionEvent> {
    match session {
        Some(events) => events.recv().await,
        None => None,
    }
}

async fn room(feed: Option<&Feed>, limit: usize) {
    if let Some(feed) = feed {
        feed.room(limit).await;
    }
}
