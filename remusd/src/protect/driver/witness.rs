//! Asks the witness what the machine wants to know. Each question is a task of its own, whose answer comes back as an event.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::super::machine::{Action, Event};
use super::super::ownership::{self, FOR_EVER, Opened, PATIENCE, STANDING};
use crate::ids::Generation;
use crate::link::RecordKey;
use crate::witness::{Answer, Health, Host, Keeper, KeeperEvent, Outcome, Refusal, Watched};

/// The witness of a protection, as its primary uses it.
pub struct Witness {
    /// Opened.
    pub opened: Opened,
    /// The backup, as records name it.
    pub peer: Host,
    /// Whether the backup's host has ever seen a record of this protection.
    pub peer_has_seen: bool,
    /// Least generation of a new record, for a host whose memory is gone.
    pub at_least: Generation,
}

/// What came from the witness.
pub(super) enum Heard {
    Event(Event),
    Alarm(String),
}

/// The witness at work.
pub(super) struct Asking {
    keeper: Keeper,
    peer: Host,
    peer_has_seen: bool,
    at_least: Generation,
    out: mpsc::UnboundedSender<Heard>,
    heard: mpsc::UnboundedReceiver<Heard>,
    /// Counts the questions, since only the newest one's silence matters.
    newest: Arc<AtomicU64>,
    watching: Option<AbortHandle>,
    followers: Vec<AbortHandle>,
    /// Keeps the probe running.
    _probe: Option<Arc<crate::witness::Probe>>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        for task in self.followers.iter().chain(&self.watching) {
            task.abort();
        }
    }
}

impl Asking {
    pub(super) fn start(witness: Witness) -> Self {
        let Witness { opened, peer, peer_has_seen, at_least } = witness;
        let (out, heard) = mpsc::unbounded_channel();
        let Opened { keeper, mut events, mut health, probe } = opened;
        let told = out.clone();
        let follow_health = tokio::spawn(async move {
            loop {
                let event = match health.borrow_and_update().clone() {
                    Health::Untried => None,
                    Health::Up => Some(Event::WitnessUp),
                    Health::Down(why) => Some(Event::WitnessDown(why)),
                };
                if event.is_some_and(|event| told.send(Heard::Event(event)).is_err()) || health.changed().await.is_err()
                {
                    return;
                }
            }
        });
        let told = out.clone();
        let follow_keeper = tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                let heard = match event {
                    KeeperEvent::Late { intent, outcome } => ownership::late(&intent, outcome).map(Heard::Event),
                    KeeperEvent::Alarm(text) => Some(Heard::Alarm(text)),
                };
                if heard.is_some_and(|heard| told.send(heard).is_err()) {
                    return;
                }
            }
        });
        let followers = vec![follow_health.abort_handle(), follow_keeper.abort_handle()];
        Self {
            keeper,
            peer,
            peer_has_seen,
            at_least,
            out,
            heard,
            newest: Arc::default(),
            watching: None,
            followers,
            _probe: probe,
        }
    }

    /// Cancel safe.
    pub(super) async fn heard(&mut self) -> Heard {
        match self.heard.recv().await {
            Some(heard) => heard,
            // A sender is here.
            None => std::future::pending().await,
        }
    }

    fn ask(
        &self,
        answer: impl Future<Output = Answer> + Send + 'static,
        known: fn(Outcome) -> Event,
        unknown: fn(String) -> Option<Event>,
    ) {
        let (out, newest) = (self.out.clone(), Arc::clone(&self.newest));
        let mine = newest.fetch_add(1, Ordering::SeqCst) + 1;
        tokio::spawn(async move {
            let event = match answer.await {
                Answer::Settled(outcome) => Some(known(outcome)),
                // Another question has taken its place: that one's answer counts.
                Answer::Unknown(_) if newest.load(Ordering::SeqCst) != mine => None,
                Answer::Unknown(why) => unknown(why),
            };
            // The protection may be over.
            let _ = event.map(|event| out.send(Heard::Event(event)));
        });
    }

    pub(super) fn carry_out(&mut self, action: Action) {
        let keeper = self.keeper.clone();
        if !matches!(action, Action::WatchRecord(_))
            && let Some(watching) = self.watching.take()
        {
            watching.abort();
        }
        match action {
            Action::ArmRecord { id } => self.arm(id),
            Action::Claim(key) => {
                let ask = async move { keeper.claim(key, PATIENCE).await };
                self.ask(ask, ownership::claimed, |_| Some(Event::ClaimUnknown));
            }
            Action::ForceRecord(_) => {
                let peer = self.peer.clone();
                let ask = async move { keeper.force(peer, PATIENCE).await };
                self.ask(ask, ownership::claimed, |_| Some(Event::ClaimUnknown));
            }
            Action::StopRecord(key) => {
                let ask = async move { keeper.stop(key, PATIENCE).await };
                self.ask(ask, ownership::stopped, |why| Some(Event::RecordUnknown(why)));
            }
            Action::HandRecord(key) => {
                let ask = async move { keeper.hand_to(key, STANDING).await };
                self.ask(ask, ownership::handed, |why| Some(Event::RecordUnknown(why)));
            }
            // Outlives this protection if it has to.
            Action::Activate(key) => drop(tokio::spawn(activate(keeper, key))),
            Action::WatchRecord(_) => {
                let out = self.out.clone();
                let task = tokio::spawn(async move {
                    let event = match keeper.watch_until_settled().await {
                        Watched::Superseded(record) => Event::RecordActive(record.to_string()),
                        Watched::Free(_) => Event::RecordForfeited,
                    };
                    let _ = out.send(Heard::Event(event));
                });
                self.watching = Some(task.abort_handle());
            }
            other => tracing::error!("no question to the witness: {other:?}"),
        }
    }

    fn arm(&self, id: u64) {
        let (keeper, out, peer) = (self.keeper.clone(), self.out.clone(), self.peer.clone());
        let (at_least, seen) = (self.at_least, self.peer_has_seen);
        self.newest.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            if let Some(event) = arm(&keeper, id, &peer, at_least, seen).await {
                let _ = out.send(Heard::Event(event));
            }
        });
    }
}

/// `None`: another question took its place.
async fn arm(keeper: &Keeper, id: u64, peer: &Host, at_least: Generation, seen: bool) -> Option<Event> {
    let refused = |text: String| Some(Event::ArmRefused { id, text });
    loop {
        let refusal = match keeper.arm(peer.clone(), at_least, seen, FOR_EVER).await {
            Answer::Settled(Outcome::Won(record)) => return Some(Event::RecordArmed { id, key: record.key() }),
            Answer::Settled(Outcome::Lost(record)) => {
                return refused(format!("the witness says that the guest is not this host's ({record})"));
            }
            Answer::Settled(Outcome::Refused(refusal)) => refusal,
            Answer::Settled(Outcome::Seen(_)) | Answer::Unknown(_) => return None,
        };
        // Handed over by us to somebody who never took it, or given back to us: ours to claim, and then to arm.
        let Refusal::WrongState(record) = &refusal else { return refused(refusal.to_string()) };
        match keeper.claim(record.key(), FOR_EVER).await {
            Answer::Settled(Outcome::Won(_)) => {}
            Answer::Settled(Outcome::Lost(record)) => return refused(record.to_string()),
            Answer::Settled(_) => return refused(refusal.to_string()),
            Answer::Unknown(_) => return None,
        }
    }
}

async fn activate(keeper: Keeper, key: RecordKey) {
    match keeper.activate(key, FOR_EVER).await {
        Answer::Settled(Outcome::Won(_)) => {}
        other => tracing::warn!("recording at the witness that the guest runs here: {other:?}"),
    }
}

#[cfg(test)]
#[path = "witness_tests.rs"]
mod tests;
