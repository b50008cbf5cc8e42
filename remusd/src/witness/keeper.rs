//! The asynchronous shell of one protection's witness client: carries its effects out over a store, keeps what it remembers durable,
//! goes on asking after its caller has lost patience, and tells then how it ended.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::client::{Client, Effect, Input, Outcome};
use super::probe::{Health, Probe};
use super::record::{Attempt, Host, Position, Record, RecordKey, RecordState, Watermark};
use super::rules::Intent;
use super::store::WitnessStore;
use crate::ids::{Generation, Nonce, ProtectionId};
use crate::ops::Backoff;
use crate::state::{StateDir, StateError};

/// Between tries: doubling from the first to the last.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// [`Backoff`] wants an end; a keeper never gives up.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a call came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Known.
    Settled(Outcome),
    /// Not known within the limit; why. Neither won nor lost: hold. It goes on in the background and ends as [`KeeperEvent::Late`],
    /// unless another call takes its place.
    Unknown(String),
}

/// What nobody is waiting for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeeperEvent {
    /// A call that was answered [`Answer::Unknown`] (or whose caller is gone) is settled now.
    Late {
        /// Which.
        intent: Intent,
        /// How.
        outcome: Outcome,
    },
    /// Something is wrong with the witness or with remembering; said once until it is right again.
    Alarm(String),
}

/// Where a loser's watching ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The other host runs the guest (or ended protection and keeps it): destroy the copy here.
    Superseded(Box<Record>),
    /// The other host gave up or gave it to us: claim with this record's key.
    Free(Box<Record>),
}

struct Ask {
    intent: Intent,
    limit: Duration,
    reply: oneshot::Sender<Answer>,
}

/// The handle; one per protection and side. Clones share it. The work ends when the last one is dropped.
#[derive(Clone)]
pub struct Keeper {
    asks: mpsc::UnboundedSender<Ask>,
    me: Host,
    health: Option<watch::Receiver<Health>>,
}

impl Keeper {
    /// Starts it on the current runtime. With a `probe`, a wait ends as soon as the witness is up again. Alarms and late outcomes come
    /// out of the receiver.
    ///
    /// # Errors
    /// [`StateError`] if identity or watermark cannot be read; then nothing may be claimed here.
    pub fn start(
        protection: ProtectionId,
        store: Arc<dyn WitnessStore>,
        state: &StateDir,
        probe: Option<&Probe>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<KeeperEvent>), StateError> {
        let me = state.host()?;
        let client = Client::new(me.clone(), protection, state.watermark(protection)?);
        let (asks, commands) = mpsc::unbounded_channel();
        let (events, out) = mpsc::unbounded_channel();
        let health = probe.map(Probe::health);
        let shell = Shell {
            protection,
            store,
            state: state.clone(),
            events,
            health: health.clone(),
            position: probe.map(Probe::position),
            unsaved: Mutex::default(),
            alarmed: Mutex::default(),
            why: Mutex::default(),
        };
        tokio::spawn(shell.run(client, commands));
        Ok((Self { asks, me, health }, out))
    }

    /// This host, as records name it.
    #[must_use]
    pub fn me(&self) -> &Host {
        &self.me
    }

    /// Carries an intent out; answers as soon as it is settled, at the latest after `limit`. A call while another is unsettled takes its
    /// place, and the other's caller (if it still waits) gets [`Answer::Unknown`].
    pub async fn ask(&self, intent: Intent, limit: Duration) -> Answer {
        let (reply, answer) = oneshot::channel();
        let stopped = || Answer::Unknown("the witness keeper has stopped".into());
        if self.asks.send(Ask { intent, limit, reply }).is_err() {
            return stopped();
        }
        answer.await.unwrap_or_else(|_| stopped())
    }

    /// [`Intent::Arm`] with a random nonce; the record won has generation and nonce for the backup.
    pub async fn arm(&self, peer: Host, at_least: Generation, peer_has_seen: bool, limit: Duration) -> Answer {
        self.ask(Intent::Arm { at_least, nonce: Nonce::random(), peer, peer_has_seen }, limit).await
    }

    /// [`Intent::Accept`].
    pub async fn accept(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::Accept(key), limit).await
    }

    /// [`Intent::Claim`]. Whatever the answer, the generation is burnt.
    pub async fn claim(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::Claim(key), limit).await
    }

    /// [`Intent::Activate`].
    pub async fn activate(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::Activate(key), limit).await
    }

    /// [`Intent::Forfeit`]: only with the copy proven gone.
    pub async fn forfeit(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::Forfeit(key), limit).await
    }

    /// [`Intent::Stop`].
    pub async fn stop(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::Stop(key), limit).await
    }

    /// [`Intent::HandOver`]: only with the guest frozen and its last epoch acknowledged.
    pub async fn hand_to(&self, key: RecordKey, limit: Duration) -> Answer {
        self.ask(Intent::HandOver(key), limit).await
    }

    /// [`Intent::Force`] with a random nonce: only on the operator's word.
    pub async fn force(&self, peer: Host, limit: Duration) -> Answer {
        self.ask(Intent::Force { nonce: Nonce::random(), peer }, limit).await
    }

    /// [`Intent::Look`].
    pub async fn look(&self, limit: Duration) -> Answer {
        self.ask(Intent::Look, limit).await
    }

    /// For the loser: looks again and again until the record says what becomes of its copy. A refusal (absent, rolled back) is no
    /// such word: it is alarmed, and watching goes on. Stop it by dropping the future.
    pub async fn watch_until_settled(&self) -> Watched {
        let mut backoff = pace(LONGEST_WAIT);
        loop {
            if let Answer::Settled(Outcome::Seen(r)) = self.ask(Intent::Look, LONGEST_WAIT).await {
                let mine = r.owner.is(&self.me);
                match r.state {
                    _ if mine => return Watched::Free(r),
                    RecordState::Active | RecordState::Stopped => return Watched::Superseded(r),
                    RecordState::Forfeited | RecordState::HandedTo if r.peer.is(&self.me) => return Watched::Free(r),
                    _ => {}
                }
            }
            pause(&mut backoff, self.health.clone()).await;
        }
    }
}

/// Between `FIRST_WAIT` and `cap`, without end.
fn pace(cap: Duration) -> Backoff {
    Backoff::new(FIRST_WAIT, cap, FOR_EVER).expect("constants in order")
}

/// The next wait, cut short when the witness comes up.
async fn pause(backoff: &mut Backoff, health: Option<watch::Receiver<Health>>) {
    let up = async {
        match health {
            Some(mut health) => {
                health.borrow_and_update();
                while health.changed().await.is_ok() {
                    if *health.borrow() == Health::Up {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            }
            None => std::future::pending::<()>().await,
        }
    };
    tokio::select! {
        () = up => {}
        ended = backoff.wait() => if ended.is_err() { *backoff = pace(LONGEST_WAIT) },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Shell {
    protection: ProtectionId,
    store: Arc<dyn WitnessStore>,
    state: StateDir,
    events: mpsc::UnboundedSender<KeeperEvent>,
    health: Option<watch::Receiver<Health>>,
    position: Option<watch::Receiver<Option<Position>>>,
    /// What the client believes to be saved and is not yet.
    unsaved: Mutex<Option<Watermark>>,
    /// The alarm that was said last.
    alarmed: Mutex<Option<String>>,
    /// What is in the way now.
    why: Mutex<String>,
}

impl Shell {
    async fn run(self, mut client: Client, mut commands: mpsc::UnboundedReceiver<Ask>) {
        let mut next = commands.recv().await;
        while let Some(ask) = next {
            next = match self.settle(&mut client, ask, &mut commands).await {
                Settled::Yes => commands.recv().await,
                Settled::Replaced(by) => by,
            };
        }
    }

    async fn settle(&self, client: &mut Client, ask: Ask, commands: &mut mpsc::UnboundedReceiver<Ask>) -> Settled {
        let Ask { intent, limit, reply } = ask;
        let mut reply = Some(reply);
        let deadline = Instant::now() + limit;
        *lock(&self.why) = format!("{} has not answered yet", self.store.describe());
        let replaced = {
            let work = self.drive(client, intent.clone());
            tokio::pin!(work);
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut work => {
                        let answer = Answer::Settled(outcome.clone());
                        if reply.take().is_none_or(|r| r.send(answer).is_err()) {
                            let _ = self.events.send(KeeperEvent::Late { intent, outcome });
                        }
                        return Settled::Yes;
                    }
                    command = commands.recv() => break command,
                    () = tokio::time::sleep_until(deadline), if reply.is_some() => {
                        if let Some(reply) = reply.take() {
                            let _ = reply.send(Answer::Unknown(lock(&self.why).clone()));
                        }
                    }
                }
            }
        };
        client.cancel();
        if let (Some(reply), Some(by)) = (reply, &replaced) {
            let _ = reply.send(Answer::Unknown(format!("given up for another call ({})", by.intent.name())));
        }
        Settled::Replaced(replaced)
    }

    async fn drive(&self, client: &mut Client, intent: Intent) -> Outcome {
        self.save().await;
        if let Some(position) = self.position.as_ref().and_then(|p| p.borrow().clone()) {
            client.observed(&position);
        }
        let mut backoff = pace(LONGEST_WAIT);
        let mut effects = client.start(intent, Attempt::random()).expect("the one before is settled or cancelled");
        loop {
            let mut input = None;
            for effect in effects {
                match effect {
                    Effect::Read(request) => {
                        let result = self.store.read(self.protection).await;
                        input = Some(Input::Read(request, result));
                    }
                    Effect::Cas { request, expected, new } => {
                        let reply = self.store.cas(self.protection, &expected, &new).await;
                        input = Some(Input::Cas(request, reply));
                    }
                    Effect::Wait { request, why } => {
                        *lock(&self.why) = why;
                        pause(&mut backoff, self.health.clone()).await;
                        input = Some(Input::Retry(request));
                    }
                    Effect::SaveWatermark(watermark) => {
                        *lock(&self.unsaved) = Some(watermark);
                        self.save().await;
                    }
                    Effect::Alarm(text) => self.alarm(text),
                    Effect::Done(outcome) => {
                        if !matches!(outcome, Outcome::Refused(_)) {
                            *lock(&self.alarmed) = None;
                        }
                        return outcome;
                    }
                }
            }
            effects = client.on(input.expect("every effect but the last asks for something"));
        }
    }

    /// Tries until the watermark is durable: nothing may be built on what could be forgotten.
    async fn save(&self) {
        let mut backoff = pace(LONGEST_WAIT);
        loop {
            let Some(watermark) = lock(&self.unsaved).clone() else { return };
            let (state, protection) = (self.state.clone(), self.protection);
            let written = tokio::task::spawn_blocking(move || state.put_watermark(protection, &watermark)).await;
            let text = match written {
                Ok(Ok(())) => {
                    *lock(&self.unsaved) = None;
                    return;
                }
                Ok(Err(e)) => e.to_string(),
                Err(e) => e.to_string(),
            };
            lock(&self.why).clone_from(&text);
            self.alarm(text);
            pause(&mut backoff, None).await;
        }
    }

    fn alarm(&self, text: String) {
        let mut alarmed = lock(&self.alarmed);
        if alarmed.as_ref() != Some(&text) {
            tracing::error!("Witness of {}: {text}", self.protection);
            *alarmed = Some(text.clone());
            let _ = self.events.send(KeeperEvent::Alarm(text));
        }
    }
}

enum Settled {
    Yes,
    /// By this call; `None`: nobody is left to ask.
    Replaced(Option<Ask>),
}
