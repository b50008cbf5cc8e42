//! Asks the witness what the machine wants to know. Each question is a task of its own, whose answer comes back as an input.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::Input;
use crate::backup::machine::{Action, Event};
use crate::link::RecordKey;
use crate::protect::ownership::{FOR_EVER, Opened, PATIENCE};
use crate::witness::{Answer, Host, Intent, Keeper, KeeperEvent, Outcome, Probe, RecordState, Watched};

/// The witness of a protection, as its backup uses it.
pub(in crate::backup) struct Asking {
    keeper: Keeper,
    /// The primary, as records name it.
    peer: Host,
    tell: mpsc::UnboundedSender<Input>,
    newest: Arc<AtomicU64>,
    watching: Option<AbortHandle>,
    followers: [AbortHandle; 2],
    _probe: Option<Arc<Probe>>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        for follower in &self.followers {
            follower.abort();
        }
        if let Some(watching) = &self.watching {
            watching.abort();
        }
    }
}

/// What a claim, or a forced one, came to.
fn claimed(outcome: Outcome) -> Event {
    match outcome {
        Outcome::Won(record) => Event::ClaimWon(record.key()),
        Outcome::Lost(record) => Event::ClaimLost(record.to_string()),
        Outcome::Refused(why) => Event::ClaimRefused(why.to_string()),
        Outcome::Seen(_) => Event::ClaimUnknown,
    }
}

impl Asking {
    pub fn start(opened: Opened, peer: Host, tell: mpsc::UnboundedSender<Input>) -> Self {
        let Opened { keeper, mut events, probe, mut health } = opened;
        let told = tell.clone();
        let health_follower = tokio::spawn(async move {
            loop {
                let now = health.borrow_and_update().clone();
                if told.send(Input::WitnessHealth(now)).is_err() || health.changed().await.is_err() {
                    return;
                }
            }
        });
        let told = tell.clone();
        let follower = tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                let input = match event {
                    KeeperEvent::Late { intent: Intent::Claim(_) | Intent::Force { .. }, outcome } => {
                        Input::Witness(claimed(outcome))
                    }
                    KeeperEvent::Late { .. } => continue,
                    KeeperEvent::Alarm(text) => Input::WitnessAlarm(text),
                };
                if told.send(input).is_err() {
                    return;
                }
            }
        });
        Self {
            keeper,
            peer,
            tell,
            newest: Arc::default(),
            watching: None,
            followers: [follower.abort_handle(), health_follower.abort_handle()],
            _probe: probe,
        }
    }

    /// Looks for the record that the primary says it has armed, to remember it (hazard F7). No answer is no trouble of the protection's.
    pub fn accept(&self, key: RecordKey) {
        let (keeper, tell) = (self.keeper.clone(), self.tell.clone());
        tokio::spawn(async move {
            let trouble = match keeper.accept(key, FOR_EVER).await {
                Answer::Settled(Outcome::Lost(record)) => record.to_string(),
                Answer::Settled(Outcome::Refused(why)) => why.to_string(),
                _ => return,
            };
            let text = format!("this host does not see the record that the primary has armed: {trouble}");
            let _ = tell.send(Input::WitnessAlarm(text));
        });
    }

    fn ask(
        &self,
        answer: impl Future<Output = Answer> + Send + 'static,
        known: impl Fn(Outcome) -> Event + Send + 'static,
    ) {
        let (tell, newest) = (self.tell.clone(), Arc::clone(&self.newest));
        let mine = newest.fetch_add(1, Ordering::SeqCst) + 1;
        tokio::spawn(async move {
            let event = match answer.await {
                Answer::Settled(outcome) => known(outcome),
                // Another question has taken its place: that one's answer counts.
                Answer::Unknown(_) if newest.load(Ordering::SeqCst) != mine => return,
                Answer::Unknown(_) => Event::ClaimUnknown,
            };
            let _ = tell.send(Input::Witness(event));
        });
    }

    pub fn carry_out(&mut self, action: Action) {
        let keeper = self.keeper.clone();
        if let Some(watching) = self.watching.take() {
            watching.abort();
        }
        match action {
            Action::Claim(key) => self.ask(async move { keeper.claim(key, PATIENCE).await }, claimed),
            Action::Force(_) => {
                let peer = self.peer.clone();
                self.ask(async move { keeper.force(peer, PATIENCE).await }, claimed);
            }
            Action::ConfirmClaim(key) => {
                let me = keeper.me().clone();
                let known = move |outcome| match outcome {
                    Outcome::Seen(record) | Outcome::Won(record) | Outcome::Lost(record) => {
                        let live = matches!(record.state, RecordState::Claimed | RecordState::Active);
                        match live && record.owner.is(&me) && record.key() == key {
                            true => Event::StillMine,
                            false => Event::ClaimLost(record.to_string()),
                        }
                    }
                    Outcome::Refused(why) => Event::ClaimRefused(why.to_string()),
                };
                self.ask(async move { keeper.look(FOR_EVER).await }, known);
            }
            Action::Activate(key) => {
                let tell = self.tell.clone();
                tokio::spawn(async move {
                    activate(&keeper, key).await;
                    let _ = tell.send(Input::Recorded);
                });
            }
            Action::ForceActive => {
                let (peer, tell) = (self.peer.clone(), self.tell.clone());
                tokio::spawn(async move {
                    if let Answer::Settled(Outcome::Won(record)) = keeper.force(peer, FOR_EVER).await {
                        activate(&keeper, record.key()).await;
                    }
                    let _ = tell.send(Input::Recorded);
                });
            }
            Action::Forfeit(key) => {
                let tell = self.tell.clone();
                tokio::spawn(async move {
                    if forfeit(&keeper, key).await {
                        let _ = tell.send(Input::Witness(Event::Forfeited));
                    }
                });
            }
            Action::WatchRecord(_) => {
                let tell = self.tell.clone();
                let task = tokio::spawn(async move {
                    let event = match keeper.watch_until_settled().await {
                        Watched::Superseded(record) => Event::RecordActive(record.to_string()),
                        Watched::Free(_) => Event::RecordForfeited,
                    };
                    let _ = tell.send(Input::Witness(event));
                });
                self.watching = Some(task.abort_handle());
            }
            other => tracing::error!("no question to the witness: {other:?}"),
        }
    }
}

/// Records that the copy runs here, for as long as that takes.
pub(in crate::backup) async fn activate(keeper: &Keeper, key: RecordKey) {
    match keeper.activate(key, FOR_EVER).await {
        Answer::Settled(Outcome::Won(_)) => {}
        other => tracing::error!("recording at the witness that the copy runs here: {other:?}"),
    }
}

/// Gives a claim up, for as long as that takes; whether nothing of ours is left at the witness.
pub(in crate::backup) async fn forfeit(keeper: &Keeper, key: RecordKey) -> bool {
    match keeper.forfeit(key, FOR_EVER).await {
        Answer::Settled(Outcome::Won(_)) => true,
        Answer::Settled(other) => {
            tracing::warn!("giving a claim up at the witness: {other:?}");
            true
        }
        Answer::Unknown(_) => false,
    }
}
